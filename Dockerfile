# The service in a container: `docker build -t stock-reservation .`
# Debian, not Alpine: the locked packages have no musl wheels, and nothing is compiled here.
FROM python:3.13-slim-bookworm AS build
WORKDIR /src
RUN python -m venv /opt/reservation
COPY requirements/run.txt requirements/traces.txt requirements/
# `--build-arg REQUIREMENTS=traces` adds what sends OpenTelemetry traces.
ARG REQUIREMENTS=run
RUN /opt/reservation/bin/pip install --no-cache-dir --disable-pip-version-check \
    --require-hashes --only-binary :all: -r "requirements/${REQUIREMENTS}.txt"
COPY pyproject.toml README.md LICENSE ./
COPY api api
COPY reservation reservation
COPY scripts/lua scripts/lua
RUN /opt/reservation/bin/pip install --no-cache-dir --disable-pip-version-check \
    --no-deps --no-build-isolation . \
    && /opt/reservation/bin/python -m compileall -q /opt/reservation/lib

FROM python:3.13-slim-bookworm
# A fixed number, so that a volume's files belong to the same user on every host.
RUN useradd --system --uid 10001 --create-home --home-dir /data reservation
COPY --from=build /opt/reservation /opt/reservation
ENV PATH=/opt/reservation/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    RESERVATION_DATA_DIR=/data \
    RESERVATION_HOST=0.0.0.0 \
    RESERVATION_PUBLIC_URL=http://127.0.0.1:8000
USER 10001
WORKDIR /data
# Secrets that are generated at first start, SQLite and the embedded server's file: where these are used,
# they must outlive the container.
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
# Liveness, not readiness: an orchestrator would otherwise end payments because a sale is closed.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('RESERVATION_PORT', '8000') + '/health/live', timeout=2)"]
ENTRYPOINT ["reservation"]
CMD ["serve"]
