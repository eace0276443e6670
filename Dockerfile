# For GPU nodes. It was not built here: no GPU, and no registry of images could be reached.
#
#     docker build -t gemoe . && docker run --gpus all --ipc host -v /data:/data gemoe train RECIPE
#
# The image with the compilers, because DeepSpeed and Triton compile on a node what a run asks for.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev build-essential \
        libopenmpi-dev openmpi-bin openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/gemoe/bin:$PATH DS_BUILD_OPS=0 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/gemoe

WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY gemoe_ds gemoe_ds
RUN pip install -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cu130 '.[mpi]'

WORKDIR /work
ENTRYPOINT ["gemoe"]
