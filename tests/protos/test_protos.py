"""The stubs are those of the .proto files, and the .proto files keep buf's STANDARD rules.

No protoc runs here: the files use a small part of the language, which `_Parser` reads into the
descriptor that protoc would make. What it does not know fails the test, so extend it then.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import loraplex_protos
import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    ServiceDescriptorProto,
)
from loraplex_protos.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

ROOT = Path(loraplex_protos.__file__).parent.parent
FILES = {
    "inference": (inference_pb2, inference_pb2_grpc),
    "adapters": (adapters_pb2, adapters_pb2_grpc),
}
SCALARS = {
    "double": FieldDescriptorProto.TYPE_DOUBLE,
    "float": FieldDescriptorProto.TYPE_FLOAT,
    "int32": FieldDescriptorProto.TYPE_INT32,
    "int64": FieldDescriptorProto.TYPE_INT64,
    "uint32": FieldDescriptorProto.TYPE_UINT32,
    "uint64": FieldDescriptorProto.TYPE_UINT64,
    "fixed32": FieldDescriptorProto.TYPE_FIXED32,
    "bool": FieldDescriptorProto.TYPE_BOOL,
    "string": FieldDescriptorProto.TYPE_STRING,
    "bytes": FieldDescriptorProto.TYPE_BYTES,
}


class _Parser:
    """One .proto file's tokens, taken from the front."""

    def __init__(self, name: str, text: str) -> None:
        code = re.sub(r"//[^\n]*", "", text)
        self._tokens: list[str] = re.findall(r'"[^"]*"|[A-Za-z_][\w.]*|\d+|\S', code)
        self.file = FileDescriptorProto(name=name)

    def parse(self) -> FileDescriptorProto:
        self._expect("syntax", "=")
        self.file.syntax = self._string()
        while self._tokens:
            match self._next():
                case "package":
                    self.file.package = self._next()
                case "import":
                    self.file.dependency.append(self._string())
                case "message":
                    self._message(self.file.message_type.add())
                    continue
                case "enum":
                    self._enum(self.file.enum_type.add())
                    continue
                case "service":
                    self._service(self.file.service.add())
                    continue
                case ";":
                    continue
                case token:
                    raise AssertionError(f"{token} is not known here")
            self._expect(";")
        self._resolve()
        return self.file

    def _next(self) -> str:
        return self._tokens.pop(0)

    def _expect(self, *tokens: str) -> None:
        for token in tokens:
            assert self._next() == token

    def _string(self) -> str:
        return self._next().strip('"')

    def _body(self) -> Iterator[str]:
        """The first token of each statement between braces."""
        self._expect("{")
        while (token := self._next()) != "}":
            yield token

    def _message(self, message: DescriptorProto) -> None:
        message.name = self._next()
        optional = []
        for token in self._body():
            match token:
                case "oneof":
                    index = len(message.oneof_decl)
                    message.oneof_decl.add(name=self._next())
                    for kind in self._body():
                        self._field(message, kind).oneof_index = index
                case "reserved":
                    start = int(self._next())
                    self._expect("to")
                    message.reserved_range.add(start=start, end=int(self._next()) + 1)
                    self._expect(";")
                case "repeated":
                    field = self._field(message, self._next())
                    field.label = FieldDescriptorProto.LABEL_REPEATED
                case "optional":
                    optional.append(self._field(message, self._next()))
                case kind:
                    self._field(message, kind)
        for field in optional:  # each stands in a oneof of its own, behind the written ones
            field.proto3_optional = True
            field.oneof_index = len(message.oneof_decl)
            message.oneof_decl.add(name=f"_{field.name}")

    def _field(self, message: DescriptorProto, kind: str) -> FieldDescriptorProto:
        field = message.field.add(name=self._next(), label=FieldDescriptorProto.LABEL_OPTIONAL)
        self._expect("=")
        field.number = int(self._next())
        self._expect(";")
        if kind in SCALARS:
            field.type = SCALARS[kind]
        else:
            field.type_name = kind
        return field

    def _enum(self, enum: EnumDescriptorProto) -> None:
        enum.name = self._next()
        for name in self._body():
            self._expect("=")
            enum.value.add(name=name, number=int(self._next()))
            self._expect(";")

    def _service(self, service: ServiceDescriptorProto) -> None:
        service.name = self._next()
        for token in self._body():
            assert token == "rpc"
            method = service.method.add(name=self._next())
            method.input_type, client_streaming = self._rpc_type()
            self._expect("returns")
            method.output_type, server_streaming = self._rpc_type()
            self._expect(";")
            if client_streaming:
                method.client_streaming = True
            if server_streaming:
                method.server_streaming = True

    def _rpc_type(self) -> tuple[str, bool]:
        self._expect("(")
        name = self._next()
        streaming = name == "stream"
        name = self._next() if streaming else name
        self._expect(")")
        return self._full(name), streaming

    def _full(self, name: str) -> str:
        return f".{name}" if "." in name else f".{self.file.package}.{name}"

    def _resolve(self) -> None:
        """Names of types become full; whether one is an enum is known only now."""
        enums = {enum.name for enum in self.file.enum_type}
        for message in self.file.message_type:
            for field in message.field:
                if field.type_name:
                    is_enum = field.type_name in enums
                    field.type = (
                        FieldDescriptorProto.TYPE_ENUM
                        if is_enum
                        else FieldDescriptorProto.TYPE_MESSAGE
                    )
                    field.type_name = self._full(field.type_name)


def embedded(name: str) -> FileDescriptorProto:
    file = FileDescriptorProto()
    FILES[name][0].DESCRIPTOR.CopyToProto(file)
    for message in file.message_type:
        for field in message.field:
            field.ClearField("json_name")
    return file


def source(name: str) -> str:
    return (ROOT / f"loraplex_protos/v1/{name}.proto").read_text(encoding="utf-8")


@pytest.fixture(params=FILES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_stubs_are_those_of_the_proto_files(name: str) -> None:
    path = f"loraplex_protos/v1/{name}.proto"
    assert _Parser(path, source(name)).parse() == embedded(name), "run `make protos`"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("string role = 1", "bytes role = 1"),
        ("string role = 1", "string role = 6"),
        ("string role = 1", "string part = 1"),
        ("string role = 1", "optional string role = 1"),
        ("repeated ChatMessage messages", "ChatMessage messages"),
        ("optional uint64 seed", "uint64 seed"),
        (
            "uint32 token_id = 1;\n    string text = 2;",
            "uint32 token_id = 1;\n    string text = 3;",
        ),
        ("reserved 30 to 39", "reserved 30 to 38"),
        ("FINISH_REASON_LENGTH = 3", "FINISH_REASON_LENGTH = 4"),
        ("returns (stream GenerateResponse)", "returns (GenerateResponse)"),
        ("message GetServerInfoRequest {}", "message GetServerInfoRequest {bool all = 1;}"),
    ],
)
def test_an_edit_is_noticed(before: str, after: str) -> None:
    text = source("inference")
    assert before in text
    edited = text.replace(before, after)
    path = "loraplex_protos/v1/inference.proto"
    assert _Parser(path, edited).parse() != embedded("inference")


def test_the_typed_stubs_know_every_message_and_field(name: str) -> None:
    tree = ast.parse((ROOT / f"loraplex_protos/v1/{name}_pb2.pyi").read_text(encoding="utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    file = embedded(name)
    assert set(classes) == {m.name for m in file.message_type} | {e.name for e in file.enum_type}
    for message in file.message_type:
        init = [n for n in classes[message.name].body if isinstance(n, ast.FunctionDef)]
        arguments = [arg.arg for arg in init[0].args.args if arg.arg != "self"] if init else []
        assert arguments == [field.name for field in message.field]


def test_the_grpc_stubs_know_every_method(name: str) -> None:
    _, stubs = FILES[name]
    for service in embedded(name).service:
        assert _methods(getattr(stubs, f"{service.name}Servicer")) == {
            method.name for method in service.method
        }
        assert hasattr(stubs, f"{service.name}Stub")


def _methods(servicer: Any) -> set[str]:
    return {method for method in vars(servicer) if not method.startswith("_")}


# buf's STANDARD rules, as far as these files could break them.

PASCAL = re.compile(r"([A-Z][a-z0-9]*)+")
LOWER_SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def test_file_rules(name: str) -> None:
    file = embedded(name)
    assert file.syntax == "proto3"
    assert re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)*\.v[1-9]\d*", file.package)
    assert file.package == "loraplex.v1"
    assert LOWER_SNAKE.fullmatch(name)
    assert not file.public_dependency
    used = {field.type_name for message in file.message_type for field in message.field}
    for dependency in file.dependency:
        package = dependency.rpartition("/")[0].replace("/", ".")
        assert any(type_name.startswith(f".{package}.") for type_name in used)


def test_message_rules(name: str) -> None:
    for message in embedded(name).message_type:
        assert PASCAL.fullmatch(message.name)
        for field in message.field:
            assert LOWER_SNAKE.fullmatch(field.name)
            assert field.label != FieldDescriptorProto.LABEL_REQUIRED
        for oneof in message.oneof_decl:
            assert LOWER_SNAKE.fullmatch(oneof.name.removeprefix("_"))


def test_enum_rules(name: str) -> None:
    for enum in embedded(name).enum_type:
        assert PASCAL.fullmatch(enum.name)
        prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper()
        assert (enum.value[0].name, enum.value[0].number) == (f"{prefix}_UNSPECIFIED", 0)
        numbers = [value.number for value in enum.value]
        assert len(set(numbers)) == len(numbers)
        for value in enum.value:
            assert re.fullmatch(rf"{prefix}(_[A-Z0-9]+)+", value.name)


def test_service_rules() -> None:
    taken: set[str] = set()
    for name in FILES:
        for service in embedded(name).service:
            assert PASCAL.fullmatch(service.name)
            assert service.name.endswith("Service")
            for method in service.method:
                assert PASCAL.fullmatch(method.name)
                types = {method.input_type, method.output_type}
                assert types == {
                    f".loraplex.v1.{method.name}Request",
                    f".loraplex.v1.{method.name}Response",
                }
                assert not types & taken
                taken |= types
