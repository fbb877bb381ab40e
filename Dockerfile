# The image of docker-compose.yml: durable and its command line, as an ordinary user. An app's own image installs durable
# beside its workflows instead, and runs `durable worker module:app`.
FROM python:3.13-slim

WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY migrations migrations
RUN pip install --no-cache-dir .

# What `durable worker` serves here; mount or copy your own.
COPY examples examples

RUN useradd --create-home durable
USER durable
ENTRYPOINT ["durable"]
CMD ["--help"]
