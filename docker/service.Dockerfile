# The service. Build it in the root of the repository:
#   docker build -f docker/service.Dockerfile -t dar-service:0.1.0 .
FROM python:3.13.14-slim-trixie AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv /opt/dar
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY dar dar
COPY service service
COPY worker worker
COPY migrations migrations
RUN /opt/dar/bin/pip install -c constraints.txt '.[service]'

FROM python:3.13.14-slim-trixie
# pg_dump and pg_restore for `dar backup`, of the version of the server in compose.yaml.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends postgresql-client-17 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --home-dir /var/lib/dar --shell /usr/sbin/nologin dar
COPY --from=build /opt/dar /opt/dar
ENV PATH=/opt/dar/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    DAR_HOME=/var/lib/dar \
    DAR_HOST=0.0.0.0 \
    DAR_PORT=8321 \
    DAR_POSTGRES_BIN=/usr/lib/postgresql/17/bin
USER 10001:10001
VOLUME /var/lib/dar
EXPOSE 8321
# Ready means: the database, its schema and the stored files can be used.
HEALTHCHECK --interval=10s --timeout=6s --start-period=90s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8321/readyz', timeout=5)"]
ENTRYPOINT ["dar"]
CMD ["serve"]
