# One image for workers, dashboard and `tuner db upgrade`. It holds no password and no data.
#
# CUDA: the torch wheel brings CUDA's libraries along, so the host needs an NVIDIA driver and the NVIDIA Container
# Toolkit and nothing else; `--profile gpu` of docker-compose.yml hands the GPUs in. A smaller image for machines
# without one: --build-arg PIP_EXTRA_INDEX_URL=<PyTorch's CPU wheels>.
FROM python:3.11-slim-bookworm
ARG PIP_EXTRA_INDEX_URL
WORKDIR /app
# What the package needs first, at the locked versions: it changes less often than the code.
COPY pyproject.toml requirements.lock ./
RUN pip install --no-cache-dir --constraint requirements.lock setuptools && \
    pip install --no-cache-dir --no-build-isolation --constraint requirements.lock .
COPY models models
COPY storage storage
COPY tuner tuner
COPY configs configs
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .
# The numbers are fixed: folders shared between machines and Kubernetes' runAsNonRoot go by them.
RUN groupadd --gid 1000 tuner && useradd --create-home --uid 1000 --gid tuner tuner && \
    mkdir data runs /artifacts && chown tuner:tuner runs /artifacts
USER 1000:1000
# In the exec form the first process is tuner itself: SIGTERM stops its workers in order.
ENTRYPOINT ["tuner"]
CMD ["--help"]
