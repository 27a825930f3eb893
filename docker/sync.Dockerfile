# syntax=docker/dockerfile:1
# The adapter mirror alone, without torch. From the repository's root:
#   docker build -f docker/sync.Dockerfile -t loramill-sync .
#   docker run -v adapters:/srv/loramill -e LORAMILL_ADAPTERS_URI=s3://bucket/model_id/adapters/ \
#     -e LORAMILL_ADAPTERS_DIR=/srv/loramill/model_id/adapters loramill-sync
# As an init container: the same with the arguments `sync --once`.
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1

RUN useradd --system --uid 10001 --create-home loramill \
    && install --directory --owner=loramill --group=loramill /srv/loramill

# The part of pyproject.toml's dependencies that `loramill sync` imports; a test holds the two together.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install \
        "aioboto3>=15.5" \
        "aiohttp>=3.11" \
        "javaproperties>=0.8" \
        "msgspec>=0.19" \
        "prometheus-client>=0.22" \
        "rich>=13.9" \
        "typer>=0.15"

WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --no-deps .

USER 10001
WORKDIR /home/loramill
EXPOSE 8080

# Healthy once the first whole pass is done.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('LORAMILL_HTTP_PORT', '8080') + '/ready', timeout=4)"]

STOPSIGNAL SIGTERM
ENTRYPOINT ["loramill"]
CMD ["sync"]
