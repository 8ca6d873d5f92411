# The page on any computer with Docker, on the processor alone:
#   docker build -t kit .
#   docker run --rm -p 127.0.0.1:7860:7860 -v "$PWD/runs/demo:/runs:ro" kit
# then open http://127.0.0.1:7860. Published so, only this computer can ask it.
FROM debian:bookworm-slim

RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 kit
WORKDIR /kit

# The Makefile's installation. PyPI's torch brings CUDA libraries of several GB, which nothing here uses; where PyTorch's own
# index can be reached, --build-arg TORCH=cpu leaves them out. Compiled now, because the user kit may not write here.
ARG TORCH=
COPY Makefile requirements.txt requirements-tools.txt ./
COPY kitlib/kernels/kaggle_image.txt kitlib/kernels/
RUN env PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 ${TORCH:+UV_TORCH_BACKEND=$TORCH} make .venv/.ready

COPY kitlib kitlib
RUN .venv/bin/python -m compileall -q kitlib

USER kit
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=2m \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/healthz', timeout=3)"]
ENTRYPOINT ["/kit/.venv/bin/python", "-m", "kitlib", "page", "--runs", "/runs", "--host", "0.0.0.0"]
