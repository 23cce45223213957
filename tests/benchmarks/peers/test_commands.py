"""What the peers' servers are started with."""

from dataclasses import replace
from pathlib import Path

import pytest
from peers import llama_cpp, vllm_server
from peers.environments import Environment, Unavailable
from peers.pipe import PeerSettings

SETTINGS = PeerSettings(
    model="/model",
    adapters={"a": "/adapters/a", "b": "/adapters/b"},
    rank=16,
    threads=2,
    max_batch=8,
    max_context=128,
    precision="bf16",
)


def test_vllm_has_room_for_every_adapter_or_has_lora_off() -> None:
    command = " ".join(vllm_server.server_command(SETTINGS, 5))
    plain = vllm_server.server_command(replace(SETTINGS, adapters={}), 5)

    assert "--max-num-seqs 8 " in command
    assert "--enable-lora --max-loras 2 --max-cpu-loras 2 --max-lora-rank 16" in command
    assert command.endswith("--lora-modules a=/adapters/a b=/adapters/b")
    assert "--enable-lora" not in plain


def test_llama_cpp_has_a_slot_a_request_with_room_for_it() -> None:
    adapters = [Path("/adapters/a.gguf"), Path("/adapters/b.gguf")]
    command = " ".join(
        llama_cpp.server_command(Path("/server"), Path("/m.gguf"), adapters, SETTINGS, 5)
    )

    assert "--threads 2 --threads-batch 2" in command
    assert "--parallel 8 --ctx-size 1024" in command
    assert command.endswith("--lora /adapters/a.gguf,/adapters/b.gguf")


def test_llama_cpp_is_compiled_for_what_the_cpu_has(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags\t: fpu avx2 avx512f avx512_vnni amx_int8\n")

    assert llama_cpp.extensions(cpuinfo) == [
        "GGML_AVX512=ON",
        "GGML_AVX512_VNNI=ON",
        "GGML_AMX_INT8=ON",
    ]
    assert llama_cpp.extensions(tmp_path / "none") == []


def test_llama_cpp_writes_its_tile_config_before_it_loads_it(tmp_path: Path) -> None:
    source = tmp_path / "mmq.cpp"
    source.write_text("    tc.rows[7] = 16;\n    _tile_loadconfig(&tc);\n    done = true;\n")

    llama_cpp.keep_tile_config(source)

    lines = [line.strip() for line in source.read_text().splitlines()]
    assert lines[2:] == ["_tile_loadconfig(&tc);", "done = true;"]
    assert '"memory"' in lines[1]
    source.write_text("tc.rows[7] = 16;\n")
    with pytest.raises(Unavailable):
        llama_cpp.keep_tile_config(source)


def test_llama_cpp_has_no_other_model_than_the_default_one(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="default model alone"):
        llama_cpp.gguf_of(Environment(tmp_path, tmp_path / "lock"), tmp_path)
