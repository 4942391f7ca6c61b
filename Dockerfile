# vitfreeze with the versions of constraints.txt.
#   docker build --build-arg TORCH_INDEX=ADDRESS -t vitfreeze .
# ADDRESS is that of PyTorch's wheel index without the CUDA version, as the install page of PyTorch gives it. The
# default is the build for CUDA 12.6, which V100s need; for newer cards add --build-arg CUDA=cu130.
# Run: docker run --gpus all --ipc=host --network=host -v /data:/data vitfreeze bash launch/local.sh doctor
FROM python:3.12-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# g++ compiles DeepSpeed's communication kernel for CPUs; ssh and pdsh start other nodes; procps and iproute2 are for
# looking around. Debian keeps one version of each in a release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git iproute2 openssh-client pdsh procps \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/vitfreeze
ENV VITFREEZE_VENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

ARG CUDA=cu126
ARG TORCH_INDEX
COPY constraints.txt ./
RUN test -n "${TORCH_INDEX}" || { echo "give --build-arg TORCH_INDEX, see the head of the Dockerfile" >&2; exit 2; } \
    && python -m venv /opt/venv \
    && pip install --extra-index-url "${TORCH_INDEX}/${CUDA}" --constraint constraints.txt torch torchvision \
    && python -c "import torch; assert torch.version.cuda.replace('.', '') == '${CUDA#cu}', torch.version.cuda"

COPY pyproject.toml setup.py README.md LICENSE ./
COPY vitfreeze vitfreeze
COPY data_prep data_prep
COPY ds_configs ds_configs
COPY launch launch
# The stamp tells launch/environment.sh that there is nothing left to install.
RUN pip install --constraint constraints.txt --editable . \
    && { cat pyproject.toml constraints.txt && echo; } | sha256sum >/opt/venv/installed

CMD ["bash", "launch/local.sh", "doctor"]
