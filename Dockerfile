# syntax=docker/dockerfile:1
# A CPU image by default. For a GPU: --build-arg TORCH=cuda, and run it with --gpus all.

FROM python:3.11-slim AS build
ARG TORCH=cpu
# An extra package index for torch's own builds, where the default one has only CUDA's.
ARG TORCH_INDEX=
WORKDIR /src
RUN python -m venv /opt/loraplex
ENV PATH=/opt/loraplex/bin:$PATH
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY protos protos
COPY kernels kernels
COPY clients clients
COPY server server
RUN if [ "$TORCH" = cuda ]; then grep -vE '^(torch|triton)==' constraints.txt > pins.txt; else cp constraints.txt pins.txt; fi \
 && pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c pins.txt '.[server]'
# The built-in model, so that the first start needs no network.
RUN XDG_CACHE_HOME=/opt/cache python -c "from loraplex.model.default import ensure_default_model; ensure_default_model()"

FROM python:3.11-slim
# The CPU ops, and what launches the GPU's, are compiled for the very machine at the first start.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 loraplex \
 && install -d -o loraplex -g loraplex /data
COPY --from=build /opt/loraplex /opt/loraplex
COPY --from=build --chown=loraplex:loraplex /opt/cache /opt/cache
ENV PATH=/opt/loraplex/bin:$PATH \
    XDG_CACHE_HOME=/opt/cache \
    XDG_DATA_HOME=/data \
    OMP_WAIT_POLICY=PASSIVE
USER loraplex
VOLUME /data
EXPOSE 50051 9464
# For plain text on the default port; override it together with --tls-cert or another --listen.
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s CMD ["python", "-c", "\
import sys, grpc; \
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse; \
from grpc_health.v1.health_pb2_grpc import HealthStub; \
status = HealthStub(grpc.insecure_channel('127.0.0.1:50051')).Check(HealthCheckRequest(), timeout=4).status; \
sys.exit(status != HealthCheckResponse.SERVING)"]
ENTRYPOINT ["loraplex"]
# Plain text inside the container's network; for anything wider give --tls-cert and --tls-key.
CMD ["serve", "--listen", "0.0.0.0:50051", "--metrics", "0.0.0.0:9464", "--insecure"]
