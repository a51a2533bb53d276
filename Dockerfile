# bdm serve in a container: docker build --tag bdm .   (with a GPU: --build-arg BASE=cuda)
# See docs/container.md.
ARG BASE=cpu

FROM python:3.12-slim-bookworm AS cpu
# Wheels without CUDA's libraries, which are several gigabytes.
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu

FROM nvidia/cuda:12.9.1-base-ubuntu24.04 AS cuda
# PyPI's wheels of torch bring CUDA's libraries along.
ENV TORCH_INDEX=
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006
FROM ${BASE} AS server
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 PATH=/opt/bdm/bin:$PATH

# The large part first: it stays as it is while the code changes. What torch needs comes with the rest.
COPY constraints.txt /src/
RUN python3 -m venv /opt/bdm \
    && pip install --constraint /src/constraints.txt --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} \
        torch torchvision

COPY pyproject.toml README.md LICENSE NOTICE /src/
COPY assets /src/assets
COPY configs /src/configs
COPY bdm /src/bdm
RUN pip install --constraint /src/constraints.txt '/src[serve]' \
    && rm -rf /src

# Models are read from /models and pictures are kept in /data; nothing else is written.
RUN useradd --create-home --uid 10001 bdm \
    && mkdir --parents /models /data \
    && chown 10001 /data
ENV BDM_MODELS=/models XDG_DATA_HOME=/data XDG_CACHE_HOME=/data/cache HF_HOME=/data/huggingface
VOLUME ["/models", "/data"]
WORKDIR /data
USER 10001

EXPOSE 8000
# Models are loaded before it listens.
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["bdm"]
# From outside it asks for a key (BDM_API_KEY) and for the pages that may call it (--cors ORIGIN).
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
