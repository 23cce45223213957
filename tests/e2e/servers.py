"""Real `loraplex serve` processes and what they leave behind."""

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import pytest
from loraplex_client import Client, RetryPolicy
from prometheus_client.parser import text_string_to_metric_families

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
    num_tokens: int
    num_drafts: int  # of these


class Step(NamedTuple):
    """One line of --step-log."""

    started_at: float  # seconds since the epoch
    rows: tuple[Row, ...]

    @classmethod
    def parse(cls, line: str) -> "Step":
        fields = json.loads(line)
        columns = ("request_ids", "digests", "num_tokens", "num_drafts")
        return cls(fields["started_at"], tuple(map(Row, *(fields[name] for name in columns))))

    @property
    def decoded_digests(self) -> set[str | None]:
        return {row.digest for row in self.rows if row.num_tokens - row.num_drafts == 1}


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


def partials(store: Path) -> list[Path]:
    """What is kept of uploads that were not published; of those that were, a note is."""
    return list((store / "uploads/default").glob("*/*.safetensors"))


def check_store(store: Path) -> None:
    """No upload is half done, and `check_blobs`."""
    assert partials(store) == []
    check_blobs(store)


def check_blobs(store: Path) -> None:
    """Every name has its blob, every blob a name, and every byte is what was written down."""
    blobs = {path.name: path for path in (store / "blobs/sha256").glob("??/*")}
    manifests = (store / "manifests/default").glob("*.json")
    assert {json.loads(path.read_text())["version"] for path in manifests} == blobs.keys()
    for folder in blobs.values():
        files = json.loads((folder / "record.json").read_text())["files"]
        for name, recorded in files.items():
            data = (folder / name).read_bytes()
            found = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            assert found == recorded, f"{folder}/{name}"


SLOW_UPLOAD = """
import sys, time
import grpc
from loraplex_client.upload import prepare
from loraplex_protos.v1 import adapters_pb2, adapters_pb2_grpc

target, name, folder, limit = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])

def slowly():
    for request in prepare(name, folder, False).requests():
        if not request.HasField("chunk"):
            yield request
            continue
        for start in range(0, min(len(request.chunk.data), limit), 65536):
            data = request.chunk.data[start : min(start + 65536, limit)]
            yield adapters_pb2.UploadAdapterRequest(
                chunk=adapters_pb2.UploadChunk(offset=request.chunk.offset + start, data=data)
            )
            time.sleep(0.02)
        time.sleep(600)

stub = adapters_pb2_grpc.AdapterServiceStub(grpc.insecure_channel(target))
stub.UploadAdapter(slowly())
"""


@contextmanager
def slow_upload(
    server: ServerProcess, name: str, folder: Path, num_bytes: int
) -> Iterator["subprocess.Popen[bytes]"]:
    """A client in a process of its own, of which so many bytes have come and no more do."""

    def arrived() -> int:
        return sum(path.stat().st_size for path in partials(server.store))

    command = [sys.executable, "-c", SLOW_UPLOAD, server.target, name, str(folder), str(num_bytes)]
    with subprocess.Popen(command) as process:
        try:
            server.eventually(lambda: arrived() == num_bytes)
            yield process
        finally:
            process.kill()
