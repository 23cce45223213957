"""An upload that breaks off, as the wire sees it."""

import zlib
from collections.abc import Iterator

import grpc
from loraplex_client.errors import from_rpc_error
from loraplex_client.upload import prepare
from loraplex_protos.v1 import adapters_pb2 as pb
from loraplex_protos.v1 import adapters_pb2_grpc

from tests.lifecycle.tiny import Content


def send_half(target: str, name: str, content: Content) -> str:
    """The client's own upload up to the middle of the file; "OK", or the reason of the refusal."""
    upload = prepare(name, content.folder, replace=True)
    data = content.weights.read_bytes()[: upload.total_size // 2]

    def requests() -> Iterator[pb.UploadAdapterRequest]:
        yield pb.UploadAdapterRequest(header=upload.header)
        chunk = pb.UploadChunk(offset=0, data=data, crc32=zlib.crc32(data))
        yield pb.UploadAdapterRequest(chunk=chunk)

    with grpc.insecure_channel(target) as channel:
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            stub.UploadAdapter(requests())
        except grpc.RpcError as error:
            return from_rpc_error(error, target).reason or "UNKNOWN"
    return "OK"
