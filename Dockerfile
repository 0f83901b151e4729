# One image for workers and dashboard. For a small CPU image:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .
FROM python:3.12-slim
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /app
COPY requirements.lock ./
RUN PIP_EXTRA_INDEX_URL=$PIP_EXTRA_INDEX_URL pip install --no-cache-dir -r requirements.lock
COPY pyproject.toml README.md ./
COPY models models
COPY storage storage
COPY tuner tuner
COPY configs configs
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e . && useradd --create-home tuner && \
    mkdir runs data && chown tuner runs data
USER tuner
# Stops a run in order: SIGTERM is what Ctrl-C is on a terminal.
ENTRYPOINT ["tuner"]
CMD ["--help"]
