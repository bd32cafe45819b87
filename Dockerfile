# Two images from one file: docker build --target cpu . (or --target cuda).
#
# The image holds the server and its small demo model. Any other checkpoint is mounted, never baked:
# docker run -v /path/to/checkpoint:/model:ro -e HCX_MODEL__PATH=/model ...
# docker/replay.sh runs the same install, start and health files without a container engine.

FROM python:3.11-slim-bookworm AS source
WORKDIR /src
COPY pyproject.toml constraints.txt config.yaml README.md LICENSE ./
COPY docker ./docker
COPY server ./server

# PyTorch for Linux comes with CUDA; this index has the small build without it.
FROM source AS build-cpu
RUN PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu docker/install.sh /opt/hcx

FROM source AS build-cuda
RUN docker/install.sh /opt/hcx

FROM python:3.11-slim-bookworm AS runtime
RUN useradd --uid 10001 --create-home hcx
ENV PYTHONDONTWRITEBYTECODE=1 \
    HCX_HTTP__HOST=0.0.0.0
EXPOSE 8000
STOPSIGNAL SIGTERM
# Loading 7 GB of weights takes a while; until then the container is "starting", not unhealthy.
HEALTHCHECK --start-period=300s --interval=10s --timeout=3s --retries=3 \
    CMD ["/opt/hcx/health.sh"]
USER hcx
WORKDIR /home/hcx
CMD ["/opt/hcx/start.sh"]

# The driver comes from the host (NVIDIA container toolkit), the CUDA libraries with PyTorch.
FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/hcx /opt/hcx

# Last, so that it is what a build without --target makes.
FROM runtime AS cpu
COPY --from=build-cpu /opt/hcx /opt/hcx
