"""Random lives of a server: nothing is lost, leaked, mixed up or waited for.

A few hundred operations here; `make fuzz` runs ten thousand and writes down what was done.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from loraplex.config import Address, ServeConfig, cache_dir

from tests.e2e.servers import ServerFactory
from tests.lifecycle.hosts import InProcess, OwnProcess
from tests.lifecycle.machine import MAX_PROMPT, MAX_TOKENS, Host, LifecycleMachine, World
from tests.lifecycle.run_log import RunLog
from tests.lifecycle.solo import Solo
from tests.lifecycle.tiny import Content, write_contents, write_model

NUM_STEPS = 50  # operations in one life
MAX_RANK = 48
NUM_SLOTS = 6
ANY = Address("127.0.0.1", 0)
MEMORY = 30 * 8192  # bytes; the largest adapter takes 17 such blocks, a request up to 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def contents(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Content]:
    return write_contents(tmp_path_factory.mktemp("contents"), model)


@pytest.fixture(scope="module")
def config(model: Path, tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    """Room for a few of the adapters, in host memory for about as many."""
    return ServeConfig(
        store=tmp_path_factory.mktemp("stores"),
        cache=cache_dir(),
        model=str(model),
        device="cpu",
        dtype="float32",
        memory=MEMORY,
        host_memory=MEMORY // 2,
        max_rank=MAX_RANK,
        max_slots=NUM_SLOTS,
        max_running=4,
        threads=1,
        drain_seconds=0.0,
    )


@pytest.fixture(scope="module")
def solo(config: ServeConfig) -> Solo:
    return Solo(replace(config, memory=40 * MEMORY, max_slots=8), MAX_PROMPT + MAX_TOKENS)


@pytest.fixture
def factory(tmp_path: Path) -> Iterator[ServerFactory]:
    with closing(ServerFactory(tmp_path)) as servers:
        yield servers


def test_in_this_process(
    config: ServeConfig, solo: Solo, contents: list[Content], operations: int, run_log: RunLog
) -> None:
    lives = count()

    def new_host() -> Host:
        store = config.store / str(next(lives))
        return InProcess(replace(config, store=store, listen=ANY, metrics=None), solo.base)

    live(World(solo, contents, MAX_RANK, new_host), operations, run_log, "one process")


def test_in_a_process_of_its_own(
    config: ServeConfig,
    solo: Solo,
    contents: list[Content],
    operations: int,
    run_log: RunLog,
    factory: ServerFactory,
) -> None:
    lives = count()
    flags = (
        f"--model={config.model}",
        "--dtype=float32",
        f"--memory={config.memory}",
        f"--host-memory={config.host_memory}",
        f"--max-rank={config.max_rank}",
        f"--max-slots={config.max_slots}",
        f"--max-running={config.max_running}",
        "--drain=0",
    )

    def new_host() -> Host:
        return OwnProcess(factory, config.store / f"own{next(lives)}", *flags)

    share = operations // 4  # each life is a process, and each restart another
    live(World(solo, contents, MAX_RANK, new_host), share, run_log, "a process of its own")


def live(world: World, operations: int, run_log: RunLog, where: str) -> None:
    class Life(LifecycleMachine):
        def __init__(self) -> None:
            super().__init__(world)

    lives = settings(
        max_examples=max(1, operations // NUM_STEPS),
        stateful_step_count=NUM_STEPS,
        phases=[Phase.generate],  # what threads do cannot be replayed, so it is not shrunk
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(Life, settings=lives)
    finally:
        run_log.add(where, world.done, world.answers, world.num_evicted)
