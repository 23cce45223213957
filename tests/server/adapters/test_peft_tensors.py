"""The safetensors file: hostile headers built by hand, and tensors that do not fit."""

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from loraplex.adapters.peft import AdapterSpec, BaseLinear, read_adapter, read_config
from loraplex.adapters.safetensors_header import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    check_finite,
    check_second_opinion,
    read_header,
)
from loraplex.errors import AdapterInvalidError

LINEARS = {
    linear.name: linear
    for layer in range(2)
    for linear in (
        BaseLinear(f"model.layers.{layer}.self_attn.q_proj", layer, "q_proj", 6, 4),
        BaseLinear(f"model.layers.{layer}.mlp.down_proj", layer, "down_proj", 4, 8),
    )
} | {
    "model.embed_tokens": BaseLinear("model.embed_tokens", None, "embed_tokens", 4, 9),
    "lm_head": BaseLinear("lm_head", None, "lm_head", 9, 4),
}
Q0, DOWN0, Q1, DOWN1, EMBED, HEAD = LINEARS
PREFIX = "base_model.model."
FILE = "adapter_model.safetensors"
SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I8": 1}


def entry(start: int, end: int, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file_of(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensors(shapes: dict[str, tuple[list[int], str]]) -> bytes:
    """A sound file of ones, its tensors in the order given."""
    header, data = {}, b""
    for name, (shape, dtype) in shapes.items():
        size = int(np.prod(shape)) * SIZES[dtype]
        header[name] = entry(len(data), len(data) + size, shape, dtype)
        data += b"\x01" * size
    return file_of(header, data)


def pair(name: str, rank: int, dtype: str = "F32", prefix: str = PREFIX) -> dict[str, Any]:
    linear = LINEARS[name]
    return {
        f"{prefix}{name}.lora_A.weight": ([rank, linear.in_features], dtype),
        f"{prefix}{name}.lora_B.weight": ([linear.out_features, rank], dtype),
    }


def read(path: Path, data: bytes, max_rank: int = 8, **fields: Any) -> AdapterSpec:
    path /= FILE
    path.write_bytes(data)
    config = read_config(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | fields), 8)
    return read_adapter(path, config, LINEARS, max_rank)


def refusal(path: Path, data: bytes, **fields: Any) -> AdapterInvalidError:
    with pytest.raises(AdapterInvalidError) as caught:
        read(path, data, **fields)
    assert str(path) not in caught.value.message
    return caught.value


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_a_sound_file_says_where_every_matrix_lies(tmp_path: Path, dtype: str, prefix: str) -> None:
    shapes = pair(DOWN1, 2, dtype, prefix) | pair(Q0, 2, dtype, prefix)
    data = tensors(shapes)
    spec = read(tmp_path, data)
    assert [module.base.name for module in spec.modules] == [Q0, DOWN1]
    assert (spec.rank, spec.target_modules, spec.warnings) == (2, ("down_proj", "q_proj"), ())
    for module in spec.modules:
        assert (module.rank, module.scale) == (2, 2.0)
        assert module.a.shape == (2, module.base.in_features)
        assert module.b.shape == (module.base.out_features, 2)
        for matrix in (module.a, module.b):
            assert matrix.dtype == dtype
            size = prod(matrix.shape) * SIZES[dtype]
            assert data[matrix.start : matrix.end] == b"\x01" * size


T = "t"
HOSTILE = {
    "empty": (b"", FILE),
    "shorter than a length": (b"\x02\0\0\0\0\0\0", FILE),
    "length beyond the file": (file_of({}, length=3), FILE),
    "length of a mebibyte and one": (
        file_of(b"{" + b" " * MAX_HEADER_BYTES, b"\0" * 64),
        FILE,
    ),
    "length of 2^64 - 1": (file_of({}, length=(1 << 64) - 1), FILE),
    "no header": (file_of(b""), FILE),
    "no tensors": (file_of({}), FILE),
    "only metadata": (file_of({"__metadata__": {"format": "pt"}}), FILE),
    "a list": (file_of(b"[]"), FILE),
    "a space first": (file_of(b' {"t": 1}'), FILE),
    "not UTF-8": (file_of(b'{"\xff": 1}'), FILE),
    "not JSON": (file_of(b"{t: 1}"), "safetensors header"),
    "nested without end": (file_of(b'{"a":' * 100_000), "safetensors header"),
    "trailing text": (file_of(b"{} {}"), "safetensors header"),
    "a pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}", FILE),
    "a zip archive": (b"PK\x03\x04" + b"\0" * 100, FILE),
    "duplicate tensors": (
        file_of(b'{"t":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]},"t":{}}', b"\0" * 4),
        "safetensors header",
    ),
    "duplicate fields": (
        file_of(b'{"t":{"dtype":"F16","dtype":"F32","shape":[1,1],"data_offsets":[0,4]}}'),
        "safetensors header",
    ),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata of text": (file_of({"__metadata__": "a"}), "__metadata__"),
    "a tensor that is a number": (file_of({T: 1}), T),
    "an unknown field": (file_of({T: entry(0, 4, [1, 1]) | {"x": 1}}, b"\0" * 4), T),
    "a missing field": (file_of({T: {"dtype": "F32", "shape": [1, 1]}}), T),
    "an unknown dtype": (file_of({T: entry(0, 8, [1, 1], "F64")}, b"\0" * 8), T),
    "a dtype of no text": (file_of({T: entry(0, 4, [1, 1], ["F32"])}, b"\0" * 4), T),
    "a scalar": (file_of({T: entry(0, 4, [])}, b"\0" * 4), T),
    "three dimensions": (file_of({T: entry(0, 4, [1, 1, 1])}, b"\0" * 4), T),
    "a dimension of zero": (file_of({T: entry(0, 0, [1 << 40, 0])}), T),
    "a negative dimension": (file_of({T: entry(0, 4, [-1, -1])}, b"\0" * 4), T),
    "a dimension of 2^63": (file_of({T: entry(0, 4, [1 << 63, 1])}, b"\0" * 4), T),
    "a product past 2^64": (file_of({T: entry(0, 4, [1 << 62, 1 << 62])}, b"\0" * 4), T),
    "a dimension that is true": (file_of({T: entry(0, 4, [True, 1])}, b"\0" * 4), T),
    "a dimension with a point": (file_of({T: entry(0, 4, [1.0, 1])}, b"\0" * 4), T),
    "a shape of text": (file_of({T: entry(0, 4, "11")} , b"\0" * 4), T),
    "offsets that say less": (file_of({T: entry(0, 4, [2, 1])}, b"\0" * 4), T),
    "offsets backwards": (file_of({T: entry(4, 0, [1, 1])}, b"\0" * 4), T),
    "offsets before the data": (file_of({T: entry(-4, 0, [1, 1])}, b"\0" * 4), T),
    "one offset": (file_of({T: entry(0, 4, [1, 1]) | {"data_offsets": [0]}}, b"\0" * 4), T),
    "a hole in front": (file_of({T: entry(4, 8, [1, 1])}, b"\0" * 8), T),
    "a hole between": (
        file_of({"a": entry(0, 4, [1, 1]), T: entry(8, 12, [1, 1])}, b"\0" * 12),
        T,
    ),
    "an overlap": (file_of({"a": entry(0, 8, [2, 1]), T: entry(4, 8, [1, 1])}, b"\0" * 8), T),
    "the same bytes twice": (
        file_of({"a": entry(0, 4, [1, 1]), T: entry(0, 4, [1, 1])}, b"\0" * 4),
        T,
    ),
    "data that is missing": (file_of({T: entry(0, 8, [2, 1])}, b"\0" * 7), FILE),
    "data to spare": (file_of({T: entry(0, 4, [1, 1])}, b"\0" * 5), FILE),
    "too many tensors": (
        file_of({f"{i:x}": 0 for i in range(MAX_TENSORS + 1)}),
        FILE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_by_name(tmp_path: Path, case: str) -> None:
    data, field = HOSTILE[case]
    assert refusal(tmp_path, data).field == field


def test_names_are_fit_for_a_message(tmp_path: Path) -> None:
    for name in ("x" * 100_000, "\ud800"):
        error = refusal(tmp_path, file_of({name: 1}))
        assert len(error.message.encode()) < 1_000


NANS = {
    "F16": [0x7C00, 0xFC00, 0x7E00, 0x7C01],
    "BF16": [0x7F80, 0xFF80, 0x7FC0, 0x7F81],
    "F32": [0x7F80_0000, 0xFF80_0000, 0x7FC0_0000, 0x7F80_0001],
}
LARGEST = {"F16": 0x7BFF, "BF16": 0x7F7F, "F32": 0x7F7F_FFFF}


@pytest.mark.parametrize(("dtype", "bits"), [(d, bits) for d in NANS for bits in NANS[d]])
def test_one_element_that_is_not_finite_is_found(tmp_path: Path, dtype: str, bits: int) -> None:
    data = bytearray(tensors(pair(Q0, 2, dtype)))
    size = SIZES[dtype]
    data[-size:] = LARGEST[dtype].to_bytes(size, "little")
    read(tmp_path, bytes(data))
    data[-size:] = bits.to_bytes(size, "little")
    assert refusal(tmp_path, bytes(data)).field == f"{PREFIX}{Q0}.lora_B.weight"


def test_finite_is_checked_to_the_last_of_many_chunks(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(tensors({"a": ([3_000_001, 1], "F32")}))
    entries = read_header(path)
    check_finite(path, entries)
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(struct.pack("<f", float("nan")))
    with pytest.raises(AdapterInvalidError, match="NaN or Inf"):
        check_finite(path, entries)


def test_the_library_must_see_the_same_tensors(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(tensors({"a": ([1, 1], "F32"), "b": ([1, 1], "F32")}))
    entries = read_header(path)
    check_second_opinion(path, entries)
    with pytest.raises(AdapterInvalidError, match="other tensors"):
        check_second_opinion(path, entries[:1])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterInvalidError, match="library"):
        check_second_opinion(path, entries)


A0, B0 = pair(Q0, 2)
NOTHING = "not the lora_A.weight"
FOREIGN = {
    f"{PREFIX}model.norm.modules_to_save.weight": "whole modules",
    f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": "token embeddings",
    f"{PREFIX}{Q0}.lora_B.bias": "biases",
    f"{PREFIX}{Q0}.base_layer.bias": "biases",
    f"{PREFIX}model.norm.weight": NOTHING,
    f"{PREFIX}{Q0}.weight": NOTHING,
    f"{PREFIX}model.layers.2.self_attn.q_proj.lora_A.weight": NOTHING,
    f"{PREFIX}model.layers.0.self_attn.o_proj.lora_B.weight": NOTHING,
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_tensor_that_is_no_matrix_of_a_linear_is_refused(tmp_path: Path, name: str) -> None:
    error = refusal(tmp_path, tensors(pair(Q0, 2) | {name: ([2, 4], "F32")}))
    assert error.field == name
    assert FOREIGN[name] in error.message


M0, OTHER_M0 = f"{PREFIX}{Q0}.lora_magnitude_vector", f"{PREFIX}{Q0}.lora_magnitude_vector.weight"


@pytest.mark.parametrize("name", [M0, OTHER_M0])
def test_dora_has_a_magnitude_for_every_feature(tmp_path: Path, name: str) -> None:
    spec = read(tmp_path, tensors(pair(Q0, 2) | {name: ([6], "BF16")}), use_dora=True)
    assert spec.use_dora
    [module] = spec.modules
    assert module.magnitude is not None
    assert (module.magnitude.tensor, module.magnitude.shape) == (name, (6,))


@pytest.mark.parametrize(
    ("magnitudes", "use_dora", "field"),
    [
        ({}, True, A0),
        ({M0: ([4], "F32")}, True, M0),
        ({M0: ([6, 1], "F32")}, True, M0),
        ({M0: ([6], "F32"), OTHER_M0: ([6], "F32")}, True, OTHER_M0),
        ({M0: ([6], "F32")}, False, M0),
    ],
)
def test_other_magnitudes_are_refused(
    tmp_path: Path, magnitudes: dict[str, Any], use_dora: bool, field: str
) -> None:
    error = refusal(tmp_path, tensors(pair(Q0, 2) | magnitudes), use_dora=use_dora)
    assert error.field == field


EMBED_A = f"{PREFIX}{EMBED}.lora_embedding_A"
HEAD_A = f"{PREFIX}{HEAD}.lora_A.weight"
ALONG_EMBED, ALONG_HEAD = f"{PREFIX}{EMBED}.weight", f"{PREFIX}{HEAD}.base_layer.weight"


def embed_pair() -> dict[str, Any]:
    return {EMBED_A: ([2, 9], "F32"), f"{PREFIX}{EMBED}.lora_embedding_B": ([4, 2], "F32")}


def test_modules_along_the_vocabulary(tmp_path: Path) -> None:
    """Adapted, and with the base's own weights along."""
    along = {ALONG_EMBED: ([9, 4], "F32"), ALONG_HEAD: ([9, 4], "BF16")}
    spec = read(tmp_path, tensors(pair(HEAD, 2) | along | embed_pair()))
    assert [module.base.name for module in spec.modules] == [EMBED, HEAD]
    assert [module.a.shape for module in spec.modules] == [(2, 9), (2, 4)]
    assert [module.b.shape for module in spec.modules] == [(4, 2), (9, 2)]
    assert spec.target_modules == ("embed_tokens", "lm_head")
    assert {(copy.tensor, copy.name) for copy in spec.base_copies} == {
        (ALONG_EMBED, EMBED),
        (ALONG_HEAD, HEAD),
    }


@pytest.mark.parametrize(
    ("shapes", "fields", "field"),
    [
        ({ALONG_EMBED: ([9, 4], "F32")}, {}, ALONG_EMBED),
        (embed_pair() | {ALONG_EMBED: ([10, 4], "F32")}, {}, ALONG_EMBED),
        (
            pair(HEAD, 2) | {f"{PREFIX}{HEAD}.lora_magnitude_vector": ([9], "F32")},
            {"use_dora": True},
            HEAD_A,
        ),
        (embed_pair(), {"alora_invocation_tokens": [1]}, EMBED_A),
        (pair(HEAD, 2), {"ensure_weight_tying": True}, "ensure_weight_tying"),
        (pair(HEAD, 2), {"target_modules": ["q_proj"]}, HEAD_A),
        (pair(HEAD, 2), {"target_modules": ["head"], "layers_to_transform": [0]}, HEAD_A),
    ],
)
def test_what_is_not_served_along_the_vocabulary(
    tmp_path: Path, shapes: dict[str, Any], fields: dict[str, Any], field: str
) -> None:
    assert refusal(tmp_path, tensors(shapes), **fields).field == field


def test_an_activated_adapter_may_adapt_the_head(tmp_path: Path) -> None:
    spec = read(tmp_path, tensors(pair(HEAD, 2)), alora_invocation_tokens=[3, 1])
    assert spec.invocation_tokens == (3, 1)


@pytest.mark.parametrize(
    ("shapes", "field"),
    [
        ({A0: ([2, 4], "F32")}, A0),
        ({B0: ([6, 2], "F32")}, B0),
        ({A0: ([2, 5], "F32"), B0: ([6, 2], "F32")}, A0),
        ({A0: ([3, 4], "F32"), B0: ([6, 3], "F32")}, A0),
        ({A0: ([2, 4], "F32"), B0: ([6, 3], "F32")}, B0),
        ({A0: ([2, 4], "F32"), B0: ([2, 6], "F32")}, B0),
        ({A0: ([8], "F32"), B0: ([6, 2], "F32")}, A0),
        ({A0: ([9, 4], "F32"), B0: ([6, 9], "F32")}, A0),
        (pair(Q0, 2) | pair(Q0, 2, prefix=""), f"{Q0}.lora_A.weight"),
        (pair(Q0, 2) | pair(Q0, 2, prefix=f"_orig_mod.{PREFIX}"), f"_orig_mod.{A0}"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(
    tmp_path: Path, shapes: dict[str, Any], field: str
) -> None:
    assert refusal(tmp_path, tensors(shapes)).field == field


def test_a_rank_over_the_servers_is_refused_naming_the_tensor(tmp_path: Path) -> None:
    data = tensors(pair(Q0, 4))
    assert read(tmp_path, data, r=4, max_rank=4).rank == 4
    error = refusal(tmp_path, data, r=4, max_rank=3)
    assert (error.field, "over this server's 3" in error.message) == (A0, True)


def test_ranks_follow_the_pattern(tmp_path: Path) -> None:
    data = tensors(pair(Q0, 4) | pair(Q1, 2) | pair(DOWN0, 2))
    pattern = {"layers.0.self_attn.q_proj": 4}
    spec = read(tmp_path, data, rank_pattern=pattern, alpha_pattern={"down_proj": 3})
    assert {m.base.name: (m.rank, m.scale) for m in spec.modules} == {
        Q0: (4, 1.0),
        DOWN0: (2, 1.5),
        Q1: (2, 2.0),
    }
    assert spec.rank == 4
    assert (
        refusal(tmp_path, data, rank_pattern={"q_proj": 4}).field == f"{PREFIX}{Q1}.lora_A.weight"
    )


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"target_modules": ["down_proj"]}, "target_modules"),
        ({"target_modules": ["proj"]}, "target_modules"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "layers_to_transform"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, "layers_to_transform"),
        ({"exclude_modules": ["self_attn.q_proj"]}, "exclude_modules"),
    ],
)
def test_a_tensor_that_peft_would_ignore_is_refused(
    tmp_path: Path, fields: dict[str, Any], key: str
) -> None:
    error = refusal(tmp_path, tensors(pair(Q0, 2)), **fields)
    assert error.field == A0
    assert key in error.message


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(((a+)+)+)+$"},
        {"target_modules": "all-linear", "exclude_modules": ""},
        {"target_modules": None},
        {"target_modules": []},
        {"target_modules": [Q0], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "layers_to_transform": []},
    ],
)
def test_a_regular_expression_is_never_evaluated(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert len(read(tmp_path, tensors(pair(Q0, 2)), **fields).modules) == 1


def test_what_the_config_says_in_vain_is_a_warning(tmp_path: Path) -> None:
    spec = read(
        tmp_path,
        tensors(pair(Q0, 2)),
        target_modules=["q_proj", "lm_head"],
        rank_pattern={f"layers.{layer}.nothing": 4 for layer in range(9)},
        alpha_pattern={"q_proj": 4, "k_proj": 4},
        fan_in_fan_out=True,
    )
    rank, alpha, target, transposed = spec.warnings
    assert rank.startswith("rank_pattern: ")
    assert rank.endswith(" and 6 more")
    assert alpha.endswith(" k_proj")
    assert target.endswith(" lm_head")
    assert transposed.startswith("fan_in_fan_out: ")


ODD = st.none() | st.booleans() | st.integers(-2, 1 << 64) | st.floats() | st.text(max_size=3)
SHAPES = st.lists(st.integers(0, 3), max_size=3) | ODD
FIELDS = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F16", "BF16", "F32"]) | ODD, "shape": SHAPES},
    optional={"data_offsets": st.lists(st.integers(0, 40), max_size=3) | ODD, "x": ODD},
)
NAMES = st.sampled_from([A0, B0, "__metadata__"]) | st.text(max_size=3)
HEADERS = st.dictionaries(NAMES, FIELDS | ODD, max_size=4).map(json.dumps).map(str.encode)


@settings(deadline=None, max_examples=400)
@given(
    header=HEADERS | st.binary(max_size=60), data=st.binary(max_size=48), shift=st.integers(-2, 2)
)
@example(header=b"{}", data=b"", shift=0)
def test_any_bytes_are_an_adapter_or_refused(
    tmp_path_factory: pytest.TempPathFactory, header: bytes, data: bytes, shift: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.mkdir(exist_ok=True)
    refusal(path, file_of(header, data, max(0, len(header) + shift)))


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_any_change_of_a_sound_file_is_an_adapter_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed"
    path.mkdir(exist_ok=True)
    sound = bytearray(tensors(pair(Q0, 2) | pair(DOWN0, 2)))
    for _ in range(data.draw(st.integers(1, 3))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    del sound[data.draw(st.integers(0, len(sound)) | st.just(len(sound))) :]
    try:
        spec = read(path, bytes(sound))
    except AdapterInvalidError:
        return
    assert len(spec.modules) == 2
