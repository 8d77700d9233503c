# docker build --target runtime -t bertemd .        predict and measure: the runtime half, no torch
# docker build --target train -t bertemd-train .    the whole pipeline
# docker run --rm -v "$PWD:/work" bertemd predict artifact "turn the lights off"
FROM python:3.12-slim AS source
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY bertemd_deploy bertemd_deploy

FROM source AS install-runtime
ENV VENV=/opt/bertemd
RUN python -m venv "$VENV" \
    && "$VENV/bin/pip" install --no-cache-dir --constraint constraints.txt .

FROM source AS install-train
ENV VENV=/opt/bertemd
RUN python -m venv "$VENV" \
    && "$VENV/bin/pip" install --no-cache-dir --constraint constraints.txt torch \
    && "$VENV/bin/pip" install --no-cache-dir --constraint constraints.txt '.[train,report]'

FROM python:3.12-slim AS train
RUN useradd --create-home --uid 10001 bertemd
COPY --from=install-train /opt/bertemd /opt/bertemd
COPY recipes /opt/bertemd/recipes
ENV PATH=/opt/bertemd/bin:$PATH
USER 10001
WORKDIR /work
ENTRYPOINT ["bertemd"]
CMD ["--help"]

FROM python:3.12-slim AS runtime
RUN useradd --create-home --uid 10001 bertemd
COPY --from=install-runtime /opt/bertemd /opt/bertemd
ENV PATH=/opt/bertemd/bin:$PATH
USER 10001
WORKDIR /work
ENTRYPOINT ["bertemd"]
CMD ["--help"]
