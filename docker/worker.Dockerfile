# syntax=docker/dockerfile:1
# The worker, for a machine with an NVIDIA GPU. From the repository's root:
#   docker build -f docker/worker.Dockerfile -t loramill-worker .
#   docker run --gpus all -e LORAMILL_MODEL=... -e LORAMILL_QUEUE_URL=... loramill-worker

# `base`, since torch from PyPI brings its own CUDA libraries: of the image it needs the driver's hooks alone.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/loramill \
    && useradd --system --uid 10001 --create-home loramill \
    && install --directory --owner=loramill --group=loramill /var/cache/loramill /srv/loramill

ENV PATH=/opt/loramill/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/cache/loramill/huggingface \
    LORAMILL_CACHE_DIR=/var/cache/loramill

WORKDIR /src

# The dependencies change less often than the source, and are gigabytes: a layer of their own.
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/requirements.txt \
    && pip install --requirement /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps . \
    && pip check

USER 10001
WORKDIR /home/loramill
EXPOSE 8080

# /live answers as soon as the process serves HTTP; whether the model is loaded is /ready's business.
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=4 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('LORAMILL_HTTP_PORT', '8080') + '/live', timeout=4)"]

# SIGTERM drains: give the container more than LORAMILL_DRAIN_TIMEOUT_SECONDS (90) to stop.
STOPSIGNAL SIGTERM
ENTRYPOINT ["loramill"]
CMD ["worker"]
