"""Bytes to messages, strictly: what grpc.aio would answer with UNKNOWN gets a reason here."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from loraplex.errors import InvalidRequestError, RequestError

M = TypeVar("M", bound=Message)


def parse(deserialize: Callable[[bytes], M], data: bytes) -> M:
    """The message in `data`, or a RequestError: nothing unknown is silently dropped."""
    try:
        message = deserialize(data)
    except DecodeError:
        raise RequestError(
            "MALFORMED_MESSAGE", "the request's bytes are not a message of this method's type"
        ) from None
    _refuse_unknown_fields(message, "")
    return message


def _refuse_unknown_fields(message: Message, path: str) -> None:
    unknown = UnknownFieldSet(message)
    if len(unknown):
        field = f"{path}{unknown[0].field_number}"
        raise RequestError("UNKNOWN_FIELD", f"field number {field} is not known", field=field)
    for descriptor, value in message.ListFields():
        if descriptor.type != FieldDescriptor.TYPE_MESSAGE:
            continue
        if isinstance(value, Message):
            _refuse_unknown_fields(value, f"{path}{descriptor.name}.")
        else:
            for index, item in enumerate(value):
                _refuse_unknown_fields(item, f"{path}{descriptor.name}[{index}].")


def check_routing(message: Message, metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """A proxy may have routed by `x-adapter-id`: it must be the adapter that the message names."""
    routed = [value for key, value in metadata if key == "x-adapter-id"]
    named = _named_adapter(message)
    if named is not None and any(value != named for value in routed):
        raise InvalidRequestError("adapter_id", "differs from the x-adapter-id in the metadata")


def _named_adapter(message: Message) -> str | None:
    if "adapter_id" in message.DESCRIPTOR.fields_by_name:
        return str(getattr(message, "adapter_id"))  # noqa: B009
    if "header" in message.DESCRIPTOR.fields_by_name and message.HasField("header"):
        return _named_adapter(getattr(message, "header"))  # noqa: B009
    return None
