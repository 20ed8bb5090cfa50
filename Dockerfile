# exalign in a container. It has not been built yet: no machine at hand runs containers.
#   docker build -t exalign .                                             # PyTorch as PyPI has it: for CUDA on Linux
#   docker build -t exalign --build-arg TORCH="torch --index-url URL" .   # URL: PyTorch's index of CPU builds
#   docker run --rm --gpus all -v "$PWD:/work" exalign align MODEL DATA
FROM python:3.11-slim
ARG TORCH="torch>=2.13"
# Triton and the CPU's compiled kernels want a C++ compiler when a model is trained.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir ${TORCH}
COPY pyproject.toml README.md LICENSE constraints.txt /exalign/
COPY src /exalign/src
RUN pip install --no-cache-dir -c /exalign/constraints.txt "/exalign[judge,people,search]"
WORKDIR /work
ENTRYPOINT ["exalign"]
