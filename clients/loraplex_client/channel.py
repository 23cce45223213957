"""How both clients reach a server: credentials, channel options, stubs."""

from pathlib import Path
from typing import Any

import grpc
from loraplex_protos.v1 import adapters_pb2_grpc, inference_pb2_grpc

from loraplex_client.upload import RetryPolicy

Tls = bool | str | Path | grpc.ChannelCredentials | None
"""None or False: no TLS. True: the usual roots. A path: a PEM file of roots to trust instead."""

# A server that restarts is found again in seconds; gRPC's own default backs off for two minutes.
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


class Connected:
    """What both clients know of their server; mutable: `_closed`."""

    def __init__(self, target: str, token: str | None, retry: RetryPolicy) -> None:
        self._target = target
        self._token = checked_token(token)
        self._retry = retry
        self._closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._target}>"

    def _require_open(self) -> None:
        if self._closed:  # gRPC's own error would speak of a channel
            raise ValueError(f"{self!r} is closed")


def sync_channel(target: str, tls: Tls) -> grpc.Channel:
    secrets = _credentials(tls)
    if secrets is None:
        return grpc.insecure_channel(target, _OPTIONS)
    return grpc.secure_channel(target, secrets, _OPTIONS)


def async_channel(target: str, tls: Tls) -> grpc.aio.Channel:
    secrets = _credentials(tls)
    if secrets is None:
        return grpc.aio.insecure_channel(target, _OPTIONS)
    return grpc.aio.secure_channel(target, secrets, _OPTIONS)


def _credentials(tls: Tls) -> grpc.ChannelCredentials | None:
    """None: plain text."""
    if tls is None or tls is False:
        return None
    if tls is True:
        return grpc.ssl_channel_credentials()
    if isinstance(tls, str | Path):
        return grpc.ssl_channel_credentials(root_certificates=Path(tls).read_bytes())
    return tls


def checked_token(token: str | None) -> str | None:
    """ValueError for what no header can hold; gRPC itself would answer with an internal error."""
    if token is not None and not (token.isascii() and token.isprintable()):
        raise ValueError("the token holds characters that an HTTP header cannot carry")
    return token


def stubs(channel: grpc.Channel | grpc.aio.Channel) -> tuple[Any, Any]:
    """InferenceService's and AdapterService's, which protoc makes without types."""
    inference = inference_pb2_grpc.InferenceServiceStub(channel)  # type: ignore[no-untyped-call]
    adapters = adapters_pb2_grpc.AdapterServiceStub(channel)  # type: ignore[no-untyped-call]
    return inference, adapters
