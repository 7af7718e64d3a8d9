# One image, three roles: `appender serve`, `projector run`, `projector operator`. No entrypoint: the role is the command.
#
# Reproducible: hashed locks, deterministic byte code, file times set to SOURCE_DATE_EPOCH; bit for bit where the builder sets the
# times of its layers too (buildah's --timestamp, BuildKit's rewrite-timestamp). A base of your own, or pinned:
#   --build-arg PYTHON_IMAGE=docker.io/library/python:3.11-slim@sha256:…
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ARG SOURCE_DATE_EPOCH=315532800
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONDONTWRITEBYTECODE=1 SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH}
WORKDIR /src
# The dependencies first: their layer stays while only our code changes. The tree gets no pip of its own.
COPY requirements/build.txt requirements/image.txt requirements/
RUN python -m venv /build && /build/bin/pip install --quiet --require-hashes -r requirements/build.txt \
 && python -m venv --without-pip /opt/eventprojector \
 && /build/bin/pip --python /opt/eventprojector/bin/python install --quiet --require-hashes --no-compile -r requirements/image.txt
COPY pyproject.toml README.md LICENSE ./
COPY eventstore eventstore
COPY appender appender
COPY projector projector
RUN /build/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /dist . \
 && /build/bin/pip --python /opt/eventprojector/bin/python install --quiet --no-deps --no-compile --no-index /dist/*.whl \
 # What names the moment or the place of the build goes: pip's note of the wheel's path, RECORD that lists it.
 && find /opt/eventprojector -name direct_url.json -delete \
 && find /opt/eventprojector -type d \( -name tests -o -name test \) -prune -exec rm -rf {} + \
 # A read-only root cannot hold byte code written later, and each start would compile again.
 && /opt/eventprojector/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/eventprojector/lib \
 && find /opt/eventprojector -exec touch --no-dereference --date="@${SOURCE_DATE_EPOCH}" {} +

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="eventprojector" \
      org.opencontainers.image.description="An event store on MongoDB for Kubernetes: contiguous appends, ordered exactly-once projections" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/eventprojector /opt/eventprojector
# A user's name, since the number may be any and stands in no /etc/passwd, yet libraries ask for it.
ENV PATH=/opt/eventprojector/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp USER=eventprojector
# A number, so that Kubernetes can prove runAsNonRoot without reading /etc/passwd.
USER 65532:65532
WORKDIR /tmp
CMD ["appender", "serve"]
