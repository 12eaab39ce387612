# The server. CPU:  docker build -t latentforge .
#             CUDA: docker build -t latentforge:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# Run: docker run --rm --stop-timeout 30 -p 127.0.0.1:7860:7860 -v "$PWD/checkpoints:/checkpoints:ro" latentforge
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

# PyTorch's own index for the wanted build; everything else comes from the default one.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# g++ compiles the step (SERVE_COMPILE=true); without it the server runs eager.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 latentforge \
    && install -d -o latentforge -g latentforge /home/latentforge/.cache

WORKDIR /app
COPY requirements.txt ./
RUN pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" -r requirements.txt

COPY pyproject.toml LICENSE server.py ./
COPY configs ./configs
COPY ae ./ae
COPY student ./student
COPY web ./web

ENV PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    SERVE_HOST=0.0.0.0 \
    SERVE_PORT=7860 \
    STUDENT_CHECKPOINT=/checkpoints/student.pt
USER 10001
EXPOSE 7860
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['SERVE_PORT'] + '/ready', timeout=2)"]
CMD ["python", "server.py"]
