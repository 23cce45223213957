"""vLLM's CPU wheel, asked through its OpenAI-compatible server.

One server without LoRA, which it compiles, and one with `--enable-lora`, for which it turns
compilation off (`vllm/platforms/cpu.py`). Its prefix cache is off: no two prompts share anything.
`nobind` leaves the threads where the other systems' are: anywhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from child import BenchmarkError
from peers.environments import Environment
from peers.http_server import HttpServer, free_port
from peers.pipe import PeerSettings

BASE = "base"


def start(environment: Environment, settings: PeerSettings, log: Path) -> HttpServer:
    """With adapters, all are registered, and there is room for as many in one batch."""
    port = free_port()
    command = [str(environment.python), "-m", *server_command(settings, port)]
    compiled = environment.folder / "compiled"
    variables = {
        "OMP_NUM_THREADS": str(settings.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(compiled / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }
    return HttpServer(
        port, command, variables, log, path="/v1/completions", body=body, tokens=tokens
    )


def server_command(settings: PeerSettings, port: int) -> list[str]:
    command = ["vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", settings.model, "--served-model-name", BASE, "--dtype", "bfloat16"]
    command += ["--max-num-seqs", str(settings.max_batch), "--no-enable-prefix-caching"]
    command += ["--max-model-len", str(settings.max_context)]
    if settings.adapters:
        adapters = [f"{name}={folder}" for name, folder in settings.adapters.items()]
        room = str(len(adapters))
        command += ["--enable-lora", "--max-loras", room, "--max-cpu-loras", room]
        command += ["--max-lora-rank", str(settings.rank), "--lora-modules", *adapters]
    return command


def body(prompt: tuple[int, ...], adapter: str | None, max_tokens: int) -> dict[str, object]:
    return {
        "model": adapter or BASE,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }


def tokens(event: Any, num_before: int) -> Sequence[int]:
    """`{"choices": [{"token_ids": [...]}]}`; `{"error": ...}` is a BenchmarkError."""
    if "error" in event:
        raise BenchmarkError(f"vLLM: {event['error']['message']}")
    return [token for choice in event["choices"] for token in choice["token_ids"] or ()]
