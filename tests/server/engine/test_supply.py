"""What is read, held and let go on an adapter's way, with no thread but the test's."""

import logging
from collections.abc import Callable
from concurrent.futures import Future

import pytest
from loraplex.adapters.pool import AdapterPool
from loraplex.adapters.tiers import HostTier, Tier
from loraplex.engine.arena import Arena
from loraplex.engine.scheduler import Scheduler, SchedulerConfig
from loraplex.engine.sequence import SamplingParams, Sequence, StopParams
from loraplex.engine.supply import MAX_READS, Supply
from loraplex.errors import RequestError

from tests.server.engine.fakes import FakeLoader, FakeRunner, Packed

SIZE = Packed("").num_bytes


class Bench:
    """A supply whose posted work runs when the test steps, and what it told others."""

    def __init__(self, num_held: int, num_blocks: int = 20, num_slots: int = 8) -> None:
        arena = Arena(num_blocks)
        self.pool = AdapterPool(arena, num_slots)
        self.scheduler = Scheduler(arena, self.pool, SchedulerConfig(4, 1, 16))
        self.runner, self.loader = FakeRunner(), FakeLoader()
        self.loader.instant = False
        self.host: HostTier[Packed] = HostTier(num_held * SIZE)
        self.loads: list[str] = []
        self.evictions: list[tuple[Tier, int]] = []
        self.failed: list[str] = []
        self.inbox: list[Callable[[], None]] = []
        self.now = 0.0
        self.supply: Supply[Packed] = Supply(
            self.scheduler,
            self.runner,
            self.loader,
            self.host,
            self,
            clock=lambda: self.now,
            post=self.inbox.append,
            fail=self.fail,
        )

    def on_load(self, digest: str, seconds: float, error: RequestError | None) -> None:
        self.loads.append(f"{digest} {seconds} {'ok' if error is None else error.reason.name}")

    def on_evictions(self, tier: Tier, count: int) -> None:
        self.evictions.append((tier, count))

    def fail(self, version: str, error: RequestError) -> None:
        self.failed.append(f"{version} {error.reason.name}")
        for sequence in self.scheduler.waiting.needing(version):
            self.scheduler.abort(sequence)

    def add(self, *digests: str | None) -> list[Sequence]:
        made = [Sequence(f"r-{d}", [0], SamplingParams(), StopParams(99), d) for d in digests]
        for sequence in made:
            self.scheduler.add(sequence)
        return made

    def step(self) -> None:
        """Take in what has ended, and start what the scheduler then asks for."""
        while self.inbox:
            self.inbox.pop(0)()
        self.supply.carry_out(self.scheduler.schedule(self.supply.size_of, self.now))
        self.scheduler.check_integrity()
        self.host.check_integrity()

    def steps(self) -> None:
        for _ in range(3):
            self.step()

    @property
    def reading(self) -> str:
        return "".join(digest for digest, future in self.loader.reads.items() if not future.done())

    def end_read(self, digests: str) -> None:
        for digest in digests:
            self.loader.reads[digest].set_result(Packed(digest))

    def pin(self, version: str, owner: str = "name") -> "Future[None]":
        told: Future[None] = Future()

        def answer(error: Exception | None) -> None:
            if error is None:
                told.set_result(None)
            else:
                told.set_exception(error)

        self.supply.pin(version, owner, answer)
        return told


def held(bench: Bench) -> str:
    return "".join(version for version in "abcdefghij" if version in bench.host)


def test_so_many_reads_at_a_time() -> None:
    bench = Bench(num_held=100)
    bench.add(*"abcdefgh")
    bench.steps()
    assert bench.reading == "abcdefgh"[:MAX_READS]
    bench.end_read("b")
    bench.step()
    assert bench.reading == "acde"
    assert bench.host.peek("b") == Packed("b")


def test_beyond_the_budget_a_few_are_held_and_those_of_the_first_always() -> None:
    bench = Bench(num_held=0)
    bench.add(None)
    bench.step()  # it runs, and there is place for one
    first, *_ = bench.add(*"abcdef")
    bench.pool.reserve("plug", 19)  # and room for none
    bench.steps()
    bench.end_read("abcd")
    bench.steps()
    assert (held(bench), bench.reading) == ("abcd", "")
    bench.scheduler.abort(first)  # a has no use any more
    bench.steps()
    assert (held(bench), bench.reading) == ("bcd", "e")
    assert bench.evictions == [(Tier.HOST, 1)]
    late = bench.add("h")[0]
    bench.scheduler.waiting.remove(late)
    late.priority = 1
    bench.scheduler.waiting.add(late)
    assert next(iter(bench.scheduler.waiting)) is late
    bench.step()
    assert bench.reading == "eh"


def test_from_disk_to_device_and_back_from_host_memory() -> None:
    bench = Bench(num_held=1)
    (first,) = bench.add("a")
    bench.step()
    bench.now = 2.0
    bench.end_read("a")
    bench.steps()
    assert bench.loads == ["a 2.0 ok"]
    assert bench.runner.bound[first.slot or 0] == "a"
    bench.scheduler.abort(first)
    bench.pool.make_room(20)
    bench.now = 3.0
    bench.add("a")
    bench.steps()
    assert bench.loads == ["a 2.0 ok", "a 0.0 ok"]
    assert list(bench.loader.reads) == ["a"]


# Versions whose files are gone.


def test_what_is_forgotten_leaves_every_place() -> None:
    bench = Bench(num_held=9)
    (sequence,) = bench.add("a")
    bench.step()
    bench.end_read("a")
    bench.steps()
    assert "a" in bench.host
    bench.supply.forget("a")
    assert "a" not in bench.host
    assert bench.pool.is_ready("a")  # it runs
    bench.scheduler.abort(sequence)
    assert bench.pool.get("a") is None


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_read_that_was_overtaken_by_a_delete(comes_back: bool) -> None:
    """Its file is gone, and holding it would hold the disk space; unless it was uploaded again."""
    bench = Bench(num_held=9, num_blocks=1)
    (gone,) = bench.add("a")
    bench.step()
    bench.scheduler.abort(gone)
    bench.supply.forget("a")
    if comes_back:
        bench.add("a")
    bench.end_read("a")
    bench.inbox.pop(0)()
    assert ("a" in bench.host) == comes_back


@pytest.mark.parametrize("pins", [False, True])
def test_the_error_of_a_read_overtaken_by_a_delete_is_not_that_of_what_came_since(
    pins: bool,
) -> None:
    bench = Bench(num_held=9)
    (gone,) = bench.add("a")
    bench.step()
    bench.scheduler.abort(gone)
    bench.supply.forget("a")
    asked = bench.pin("a") if pins else bench.add("a")
    bench.loader.reads["a"].set_exception(RequestError("ADAPTER_UNUSABLE", "its files are gone"))
    bench.step()
    assert bench.reading == "a"
    bench.end_read("a")
    bench.steps()
    assert (bench.failed, bench.loads) == ([], ["a 0.0 ok"])
    assert not isinstance(asked, Future) or asked.result(0) is None


# Pins.


def test_a_pin_is_answered_when_its_size_is_known_and_then_comes_to_the_device() -> None:
    bench = Bench(num_held=0)
    told = [bench.pin("a", "x"), bench.pin("a", "y"), bench.pin("a", "y")]
    assert bench.reading == "a"
    assert not any(pin.done() for pin in told)
    bench.end_read("a")
    bench.steps()
    assert [pin.result(0) for pin in told] == [None] * 3
    assert bench.pool.is_ready("a")
    assert held(bench) == ""
    assert bench.pin("a", "z").done()
    for owner in "xyz":
        assert bench.pool.is_pinned("a")
        bench.supply.unpin("a", owner)
    assert not bench.pool.is_pinned("a")


def test_pins_beyond_half_of_the_memory_are_refused_and_nothing_is_kept_for_them() -> None:
    bench = Bench(num_held=0, num_blocks=6)
    first, second = bench.pin("a"), bench.pin("b")
    bench.end_read("ab")
    bench.steps()
    assert first.result(0) is None
    with pytest.raises(RequestError, match=r"of the blocks \(--memory\): 2 and 2, of 3$") as error:
        second.result(0)
    assert error.value.reason.name == "PINS_EXCEED_MEMORY"
    assert error.value.metadata == {"option": "--memory"}
    assert error.value.retry_after is not None
    assert bench.pool.is_ready("a")
    assert (bench.pool.missing_pins, held(bench)) == ([], "")


def test_pins_beyond_half_of_the_slots_are_told_so() -> None:
    bench = Bench(num_held=0, num_slots=2)
    first, second = bench.pin("a"), bench.pin("b")
    bench.end_read("ab")
    bench.steps()
    assert first.result(0) is None
    with pytest.raises(RequestError, match=r"of the slots \(--max-slots\): 1 may be pinned$"):
        second.result(0)


def test_a_pin_taken_back_before_it_was_answered() -> None:
    bench = Bench(num_held=0)
    told = bench.pin("a")
    bench.supply.unpin("a", "name")
    assert told.done()
    bench.end_read("a")
    bench.steps()
    assert not bench.pool.is_pinned("a")
    assert held(bench) == ""


def test_a_pin_of_what_cannot_be_read(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(num_held=0)
    bench.add("a")
    told = bench.pin("a")
    bench.loader.reads["a"].set_exception(RequestError("ADAPTER_UNUSABLE", "it is damaged"))
    bench.steps()
    with pytest.raises(RequestError, match="damaged"):
        told.result(0)
    assert bench.failed == ["a ADAPTER_UNUSABLE"]
    assert bench.loads == ["a 0.0 ADAPTER_UNUSABLE"]
    assert bench.reading == ""
    assert caplog.text == ""


def test_a_pin_whose_copy_fails_waits_for_somebody_else_to_try(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Or it would be tried again at every step."""
    bench = Bench(num_held=9)
    told = bench.pin("uncopyable")
    bench.loader.reads["uncopyable"].set_result(Packed("uncopyable"))
    with caplog.at_level(logging.WARNING):
        bench.steps()
    assert told.result(0) is None
    assert "is pinned, but is not here" in caplog.text
    assert (bench.pool.missing_pins, bench.pool.is_pinned("uncopyable")) == ([], True)
    assert bench.pool.arena.num_free == 20
    assert bench.failed == ["uncopyable INTERNAL"]
    bench.add("uncopyable")
    bench.step()
    bench.loader.reads["uncopyable"].set_result(Packed("mended"))
    bench.steps()
    assert bench.pool.is_ready("uncopyable")
    assert bench.pool.make_room(19) is None
