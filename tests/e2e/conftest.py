"""Real `loraplex serve` processes and what they leave behind; adapters and a model for them."""

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from shutil import copy
from typing import Any, NamedTuple

import numpy as np
import pytest
from loraplex.config import DEFAULT_MODEL, cache_dir
from loraplex.model.config import ModelConfig, linear_prefix, read_model_config
from loraplex_client import Client, RetryPolicy
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import save_file

LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) [A-Z]+ [\w.]+ ")
READY_LINE = re.compile(
    r"loraplex: serving (?P<model>\S+) on (?P<target>127\.0\.0\.1:\d+) "
    r"\((?P<device>[\w-]+), nf4, (?P<memory>[\d.]+ [KMG]iB) for KV and adapters\)\n"
)
SECONDS = 30.0  # the longest wait for anything that a quiet machine does in milliseconds


class Row(NamedTuple):
    """One sequence's part of a step."""

    request_id: str
    digest: str | None
    num_tokens: int  # 1: decoding


class Step(NamedTuple):
    """One line of --step-log."""

    started_at: float  # seconds since the epoch
    rows: tuple[Row, ...]

    @classmethod
    def parse(cls, line: str) -> "Step":
        fields = json.loads(line)
        columns = (fields["request_ids"], fields["digests"], fields["num_tokens"])
        return cls(fields["started_at"], tuple(map(Row, *columns)))

    @property
    def decoded_digests(self) -> set[str | None]:
        return {row.digest for row in self.rows if row.num_tokens == 1}


@dataclass(slots=True)
class ServerProcess:
    """One server: its process, and the files it writes. `ready` is its one line on stdout."""

    process: "subprocess.Popen[str]"
    store: Path
    stderr: Path
    step_log: Path
    ready: str = ""

    @property
    def target(self) -> str:
        match = READY_LINE.fullmatch(self.ready)
        assert match is not None, f"not a ready line: {self.ready!r}"
        return match["target"]

    def client(self) -> Client:
        """Fails at once where the command line would try an upload again."""
        return Client(self.target, retry=RetryPolicy(delays=()))

    def log(self) -> str:
        return self.stderr.read_text(encoding="utf-8", errors="replace")

    def logged(self, request_id: str) -> tuple[float, str]:
        """When a call had ended, in seconds since the epoch, and the line that says so."""

        def lines() -> list[str]:
            wanted = f" request_id={request_id} "
            return [line for line in self.log().splitlines() if wanted in line]

        self.eventually(lambda: bool(lines()))
        (line,) = lines()
        match = LOG_LINE.match(line)
        assert match is not None
        return datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f").timestamp(), line

    def steps(self) -> list[Step]:
        lines = self.step_log.read_text(encoding="utf-8").splitlines(keepends=True)
        return [Step.parse(line) for line in lines if line.endswith("\n")]

    def steps_of(self, request_id: str) -> list[Step]:
        return [step for step in self.steps() if request_id in {r.request_id for r in step.rows}]

    @property
    def metrics_url(self) -> str:
        match = re.search(r"metrics on (http://127\.0\.0\.1:\d+/metrics)$", self.log(), re.M)
        assert match is not None
        return match[1]

    def samples(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """Every metric as it stands, by name and labels."""
        with urllib.request.urlopen(self.metrics_url, timeout=SECONDS) as response:
            text = response.read().decode()
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def metric(self, name: str, **labels: str) -> float:
        return self.samples().get((f"loraplex_{name}", frozenset(labels.items())), 0.0)

    def is_idle(self) -> bool:
        """Nothing runs, nothing waits, and no KV is held."""
        kv = self.metric("memory_blocks", use="kv")
        return kv == self.metric("requests_running") == self.metric("requests_waiting") == 0

    def eventually(self, condition: Callable[[], bool], seconds: float = SECONDS) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "what was waited for did not come"
            time.sleep(0.02)

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """The exit code. The ready line was all that it had to say on stdout."""
        self.process.send_signal(how)
        out, _ = self.process.communicate(timeout=60)
        assert out == ""
        return self.process.returncode


class ServerFactory:
    """Starts servers; keeps them, so that none is left behind and a failure shows their logs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.servers: list[ServerProcess] = []

    def __call__(self, *flags: str, store: Path | None = None) -> ServerProcess:
        """Once it is ready. Later flags win over the ones all servers get."""
        server = self._spawn(flags, store)
        assert server.process.stdout is not None
        server.ready = server.process.stdout.readline()
        if not server.ready:
            pytest.fail(f"the server did not start:\n{server.log()}")
        return server

    def _spawn(self, flags: Sequence[str], store: Path | None) -> ServerProcess:
        folder = self._folder / f"server{len(self.servers)}"
        folder.mkdir()
        stderr, step_log = folder / "stderr", folder / "steps.jsonl"
        store = store or folder / "store"
        command = [sys.executable, "-m", "loraplex.cli", "serve", "--listen=127.0.0.1:0"]
        command += ["--metrics=127.0.0.1:0", f"--store={store}", f"--step-log={step_log}"]
        command += ["--device=cpu", "--threads=1", "--memory=192M", "--drain=10", *flags]
        with stderr.open("w") as file:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
        self.servers.append(ServerProcess(process, store, stderr, step_log))
        return self.servers[-1]

    def close(self) -> None:
        """End what still runs, all of it, then judge how it ended."""
        running = [server for server in self.servers if server.process.poll() is None]
        codes = []
        for server in running:
            try:
                codes.append(server.end())
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.communicate()
                codes.append(server.process.returncode)
        assert codes == [0] * len(running)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: "pytest.CallInfo[None]"
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failure is told with what the test's servers wrote to stderr."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            servers = value.servers if isinstance(value, ServerFactory) else [value]
            for server in servers:
                if isinstance(server, ServerProcess):
                    report.sections.append((f"{server.stderr}", server.log()[-8000:]))
    return report


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[ServerFactory]:
    """For tests that need servers of their own."""
    factory = ServerFactory(tmp_path)
    try:
        yield factory
    finally:
        factory.close()


def shared(folder: Path, *flags: str) -> Iterator[ServerProcess]:
    """A server for many tests; when they are through, nothing may be left of them."""
    factory = ServerFactory(folder)
    try:
        server = factory("--log-level=debug", *flags)
        yield server
        server.eventually(server.is_idle)
        check_store(server.store)
        assert "Traceback" not in server.log()
        assert " ERROR " not in server.log()
    finally:
        factory.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The embedded model as it is served by default, in bfloat16."""
    yield from shared(tmp_path_factory.mktemp("bfloat16"))


@pytest.fixture(scope="session")
def exact_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The embedded model in float32, where a batch changes nothing."""
    yield from shared(tmp_path_factory.mktemp("float32"), "--dtype=float32")


@pytest.fixture
def client(server: ServerProcess) -> Iterator[Client]:
    with server.client() as client:
        yield client


def check_store(store: Path) -> None:
    """Every name has its blob, every blob a name, and every byte is what was written down."""
    assert list((store / "uploads/default").iterdir()) == []
    blobs = {path.name: path for path in (store / "blobs/sha256").glob("??/*")}
    manifests = (store / "manifests/default").glob("*.json")
    assert {json.loads(path.read_text())["version"] for path in manifests} == blobs.keys()
    for folder in blobs.values():
        files = json.loads((folder / "record.json").read_text())["files"]
        for name, recorded in files.items():
            data = (folder / name).read_bytes()
            found = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            assert found == recorded, f"{folder}/{name}"


@pytest.fixture(scope="session")
def default_config(server: ServerProcess) -> ModelConfig:
    """The embedded model's; its folder is there once a server has started."""
    return read_model_config(cache_dir() / "models" / DEFAULT_MODEL)


@pytest.fixture(scope="session")
def tiny_model(default_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers under the embedded model's tokenizer: it starts and steps quickly."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        copy(cache_dir() / "models" / DEFAULT_MODEL / name, folder)
    write_model(folder, default_config.vocab_size)
    return folder


def write_model(folder: Path, vocab_size: int) -> None:
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    rng = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": rng.standard_normal((vocab_size, 64)) / 20}
    for linear in read_model_config(folder).linears():
        shape = (linear.out_features, linear.in_features)
        tensors[f"{linear.name}.weight"] = rng.standard_normal(shape) / 8
    norms = [f"model.layers.{n}.{w}_layernorm" for n in (0, 1) for w in ("input", "post_attention")]
    for norm in (*norms, "model.norm"):
        tensors[f"{norm}.weight"] = np.ones(64)
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, folder / "model.safetensors")


class AdapterMaker:
    """Writes PEFT folders; what an adapter says differs from the base and from every other."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = 0

    def __call__(
        self, base: ModelConfig, rank: int = 4, modules: Sequence[str] = ("q_proj", "v_proj")
    ) -> Path:
        self._made += 1
        folder = self._folder / f"adapter{self._made}"
        folder.mkdir()
        rng = np.random.default_rng(self._made)
        tensors: dict[str, Any] = {}
        for linear in base.linears():
            if linear.module in modules:
                path = f"base_model.model.{linear_prefix(linear.layer, linear.module)}"
                a = rng.standard_normal((rank, linear.in_features)) / linear.in_features**0.5
                b = rng.standard_normal((linear.out_features, rank)) * (0.7 / rank**0.5)
                tensors[f"{path}.{linear.module}.lora_A.weight"] = a.astype(np.float32)
                tensors[f"{path}.{linear.module}.lora_B.weight"] = b.astype(np.float32)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
        config |= {"task_type": "CAUSAL_LM", "target_modules": list(modules)}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> AdapterMaker:
    return AdapterMaker(tmp_path_factory.mktemp("adapters"))
