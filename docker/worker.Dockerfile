# A worker, for NVIDIA GPUs. Build it in the root of the repository:
#   docker build -f docker/worker.Dockerfile -t dar-worker:0.1.0 .
# torch brings its own CUDA libraries; this image brings what the driver of the host needs.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04 AS build
# `worker,deepspeed` for the strategies zero2 and zero3
ARG EXTRAS=worker
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.12-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3.12 -m venv /opt/dar
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY dar dar
COPY service service
COPY worker worker
COPY migrations migrations
RUN /opt/dar/bin/pip install -c constraints.txt ".[${EXTRAS}]"

FROM nvidia/cuda:13.0.2-base-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3.12 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --home-dir /var/lib/dar --shell /usr/sbin/nologin dar
COPY --from=build /opt/dar /opt/dar
# What trainers download and compile is kept in the volume; nothing else can be written to.
ENV PATH=/opt/dar/bin:/usr/local/nvidia/bin:/usr/local/cuda/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/dar \
    DAR_HOME=/var/lib/dar \
    HF_HOME=/var/lib/dar/huggingface \
    XDG_CACHE_HOME=/var/lib/dar/cache \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
VOLUME /var/lib/dar
# A worker sets the time of this file with each claim and each heartbeat.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["sh", "-c", "test -n \"$(find /var/lib/dar/worker/slot-${DAR_SLOT:-0}/alive -mmin -3)\""]
ENTRYPOINT ["dar"]
CMD ["worker"]
