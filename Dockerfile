# One image for workers and dashboard.
FROM python:3.12-slim
WORKDIR /app
COPY requirements.lock ./
RUN pip install --no-cache-dir -r requirements.lock
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
