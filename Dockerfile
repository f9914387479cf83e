# The image of viewer-worker. Any user id will do, the root filesystem may be read-only, and no capability is needed:
# the worker writes nothing but its log, which goes to stderr.

FROM python:3.13-slim-bookworm AS build
# For a mirror of the package index.
ARG PIP_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python -m venv --without-pip /opt/viewer-worker

COPY requirements.lock requirements-build.lock ./
RUN pip --python /opt/viewer-worker/bin/python install --no-compile --only-binary :all: --require-hashes -r requirements.lock \
    && pip install --require-hashes -r requirements-build.lock

COPY pyproject.toml PACKAGE.md LICENSE ./
COPY alembic alembic
COPY worker worker
# Bytecode that is not compared with its source: that goes by dates, which not every way of copying an image keeps.
RUN pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
    && pip --python /opt/viewer-worker/bin/python install --no-compile --no-deps dist/*.whl \
    && python -m compileall -q --invalidation-mode unchecked-hash /opt/viewer-worker/lib


FROM python:3.13-slim-bookworm
# The base image comes without the bytecode of the standard library: compiling it at each start would double its duration.
RUN pip uninstall --yes --quiet --root-user-action ignore pip \
    && python -m compileall -q --invalidation-mode unchecked-hash \
       -x '/(site-packages|test|ensurepip|idlelib|pydoc_data|tkinter|turtledemo)/' /usr/local/lib/python3.13
COPY --from=build /opt/viewer-worker /opt/viewer-worker
ENV PATH=/opt/viewer-worker/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 3003 50051
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=15s CMD ["viewer-worker", "healthcheck"]
ENTRYPOINT ["viewer-worker"]
CMD ["run"]

ARG VERSION=dev
ARG REVISION=unknown
ARG SOURCE=
LABEL org.opencontainers.image.title="viewer-worker" \
      org.opencontainers.image.description="Makes the views that applications count in Redis durable in PostgreSQL/TimescaleDB, each view exactly once." \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.source="$SOURCE"
