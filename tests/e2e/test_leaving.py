"""Clients that go away before their answer is whole: nothing is generated for them any more."""

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from loraplex_client import Client, DeadlineExceeded, Delta, Started

if TYPE_CHECKING:
    from tests.e2e.servers import ServerProcess

PROMPT = "Once upon a time"
MANY = 4000  # tokens: minutes


def check_nobody_works_for(server: "ServerProcess", request_id: str) -> None:
    """The call was given up; at most the pass that ran just then still held it."""
    ended_at, line = server.logged(request_id)
    assert " outcome=cancelled" in line
    server.eventually(server.is_idle)
    steps = server.steps_of(request_id)
    assert 0 < len(steps) < MANY / 4
    assert sum(step.started_at > ended_at for step in steps) <= 1


def test_a_cancel_in_mid_stream_frees_at_once(server: "ServerProcess", client: Client) -> None:
    events = client.stream(PROMPT, max_tokens=MANY, ignore_eos=True)
    started = next(events)
    assert isinstance(started, Started)
    assert all(isinstance(next(events), Delta) for _ in range(3))
    assert server.metric("memory_blocks", use="kv") > 0
    events.close()
    left_at = time.time()
    check_nobody_works_for(server, started.request_id)
    assert server.logged(started.request_id)[0] < left_at + 5


def test_one_that_leaves_does_not_disturb_the_others(exact_server: "ServerProcess") -> None:
    with exact_server.client() as client:
        alone = client.complete(PROMPT, max_tokens=16, temperature=0.0)
        leaving = client.stream("1, 2, 3,", max_tokens=MANY, ignore_eos=True)
        staying = client.stream(PROMPT, max_tokens=16, temperature=0.0)
        started, _, first = next(leaving), next(staying), next(staying)
        leaving.close()
        deltas = [event for event in (first, *staying) if isinstance(event, Delta)]
    assert tuple(token for delta in deltas for token in delta.token_ids) == alone.token_ids
    assert isinstance(started, Started)
    check_nobody_works_for(exact_server, started.request_id)


def test_a_deadline_frees_as_a_cancel_does(server: "ServerProcess", client: Client) -> None:
    with pytest.raises(DeadlineExceeded):
        client.complete(PROMPT, max_tokens=MANY, ignore_eos=True, timeout=1.5, request_id="late")
    check_nobody_works_for(server, "late")


def test_a_client_that_is_killed_frees_its_memory(server: "ServerProcess") -> None:
    command = [sys.executable, "-m", "loraplex.cli", "generate", PROMPT, "--json", "--ignore-eos"]
    command += ["--max-tokens", str(MANY), "--server", server.target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        request_id = json.loads(process.stdout.readline())["request_id"]
        process.stdout.readline()
        assert server.metric("memory_blocks", use="kv") > 0
        process.kill()
    check_nobody_works_for(server, request_id)
