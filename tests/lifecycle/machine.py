"""Everything a client may do with adapters, in any order, and what must hold after each of it."""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from loraplex_client import Client, Delta, Finished, LoraplexError, Residency, Started

from tests.lifecycle.solo import Solo
from tests.lifecycle.tiny import Content
from tests.lifecycle.wire import send_half

NAMES = ("ann", "bob", "cho", "dee", "eve", "fay", "gus", "hal")
MAX_PROMPT, MAX_TOKENS = 40, 24
MAX_LIVE = 6
SECONDS = 60.0
WEIGHTS = (0.5, 1.0, -0.25)

Parts = tuple[tuple[Content, float], ...]


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.01)


class Host(Protocol):
    """A server with more adapters than memory, over an empty store."""

    @property
    def target(self) -> str: ...

    @property
    def store(self) -> Path: ...

    can_be_killed: bool

    def restart(self, *, kill: bool) -> None:
        """On the same store; whatever ran is over."""

    def check_idle(self) -> None:
        """The invariants, once nothing runs."""

    def num_evicted(self) -> int:
        """Adapters that had to leave the device since the server started."""

    def close(self) -> None: ...


@dataclass(slots=True)
class World:
    """What all runs share. Mutable: the counts of what was done and of what was answered."""

    solo: Solo
    contents: Sequence[Content]
    max_rank: int
    new_host: Callable[[], Host]
    done: "Counter[str]" = field(default_factory=Counter)
    answers: "Counter[str]" = field(default_factory=Counter)
    num_evicted: int = 0


@dataclass(slots=True)
class Named:
    """What a name should stand for."""

    content: Content
    pinned: bool = False
    stays: bool = False  # it is pinned, and was seen on the device since


@dataclass(frozen=True, slots=True)
class Ended:
    """How a request ended: whole, left by its client, or with an error's reason."""

    token_ids: tuple[int, ...]
    is_whole: bool
    error: str | None


class Request:
    """One Generate call on a thread of its own, closed after `leave_after` tokens if that is set.

    Mutable: `versions`, set before `started`.
    """

    def __init__(
        self, parts: Parts, prompt: tuple[int, ...], num_tokens: int, leave_after: int | None
    ) -> None:
        self.parts = parts
        self.prompt = prompt
        self.num_tokens = num_tokens
        self.leave_after = leave_after
        self.versions: tuple[str, ...] = ()
        self.started = threading.Event()
        self.ended: Future[Ended]

    def run(self, client: Client, named: Mapping[str, float]) -> Ended:
        options: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}
        if len(named) > 1:
            options["blend"] = named
        elif named:
            (options["adapter_id"],) = named
        stream = client.stream(
            token_ids=self.prompt, max_tokens=self.num_tokens, timeout=SECONDS, **options
        )
        said: list[int] = []
        try:
            with closing(stream) as events:
                return self._listen(events, said)
        except LoraplexError as error:
            return Ended(tuple(said), False, error.reason or error.code.name)
        finally:
            self.started.set()

    def _listen(self, events: Iterator[object], said: list[int]) -> Ended:
        for event in events:
            match event:
                case Started():
                    self.versions = tuple(used.version for used in event.adapters)
                    self.started.set()
                case Delta():
                    said.extend(event.token_ids)
                    if self.leave_after is not None and len(said) >= self.leave_after:
                        return Ended(tuple(said), False, None)
                case Finished():
                    return Ended(tuple(said), True, None)
        raise AssertionError("a stream ended without an event that says so")


class LifecycleMachine(RuleBasedStateMachine):
    """Mutable: `names`, what each should stand for; `halves`, uploads that broke off; `live`, the
    requests whose end was not looked at yet; `has_pinned`, whether anything ever was.
    """

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.names: dict[str, Named] = {}
        self.halves: set[tuple[str, Content]] = set()
        self.live: list[Request] = []
        self.has_pinned = False
        self.pool = ThreadPoolExecutor(MAX_LIVE)
        self.host = world.new_host()
        self.client = Client(self.host.target)

    # What clients do.

    name = st.sampled_from(NAMES)
    number = st.integers(0, 11)

    @initialize(numbers=st.lists(number, min_size=4, max_size=8))
    def begin(self, numbers: list[int]) -> None:
        for name, number in zip(NAMES, numbers, strict=False):
            self.upload(name=name, number=number, replace=False)

    @rule(name=name, number=number, replace=st.booleans())
    def upload(self, name: str, number: int, replace: bool) -> None:
        self._count("upload")
        content, holds = self.world.contents[number], self.names.get(name)
        if holds is not None and holds.content != content and not replace:
            refused = self._answer(self.client.upload_adapter, name, content.folder)
            assert refused == "ADAPTER_EXISTS"
            return
        result = self.client.upload_adapter(name, content.folder, replace=replace)
        assert result.created is (holds is None or holds.content != content)
        assert result.adapter.version == self.world.solo.version(content)
        self._publish(name, content)

    @rule(name=name, number=number, is_stale=st.booleans())
    def upload_if_match(self, name: str, number: int, is_stale: bool) -> None:
        self._count("upload with an etag")
        content, holds = self.world.contents[number], self.names.get(name)
        etag = "0" * 32
        if holds is not None and not is_stale:
            etag = self.client.get_adapter(name).etag
        answer = self._answer(self.client.upload_adapter, name, content.folder, if_match_etag=etag)
        if holds is not None and (not is_stale or holds.content == content):
            assert answer is None
            self._publish(name, content)
        else:
            assert answer == "ETAG_MISMATCH"

    @rule(name=name, number=number)
    def send_half(self, name: str, number: int) -> None:
        """And lose the connection; a later upload of the same goes on from there."""
        self._count("half an upload")
        content, holds = self.world.contents[number], self.names.get(name)
        answer = send_half(self.host.target, name, content)
        if holds is not None and holds.content == content:
            assert answer == "OK"
        elif (name, content) in self.halves:
            assert answer == "OFFSET_MISMATCH"
        else:
            assert answer == "UPLOAD_INCOMPLETE"
            self.halves.add((name, content))

    @rule(name=name, is_due=st.integers(0, 2))
    def delete(self, name: str, is_due: int) -> None:
        if is_due:  # else few would be there
            return
        self._count("delete")
        expected = None if name in self.names else "ADAPTER_NOT_FOUND"
        assert self._answer(self.client.delete_adapter, name) == expected
        self.names.pop(name, None)

    @rule(name=name, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        self._count("pin" if pinned else "unpin")
        answer = self._answer(self.client.pin_adapter, name, pinned)
        if name not in self.names:
            assert answer == "ADAPTER_NOT_FOUND"
        elif answer is None:
            self.has_pinned |= pinned
            self.names[name].pinned = pinned
            self.names[name].stays = False
        else:
            assert pinned
            assert answer == "PINS_EXCEED_MEMORY"

    seed = st.integers(0, 7)
    num_tokens = st.integers(1, MAX_TOKENS)
    leave_after = st.none() | st.integers(0, MAX_TOKENS)

    @rule(name=st.none() | name, seed=seed, num_tokens=num_tokens, leave_after=leave_after)
    def generate(
        self, name: str | None, seed: int, num_tokens: int, leave_after: int | None
    ) -> None:
        self._count("generate")
        if name is not None and self.names and seed:  # seldom a name that is not there
            name = sorted(self.names)[NAMES.index(name) % len(self.names)]
        if name is not None and name not in self.names:
            assert self._answer(self.client.complete, token_ids=[1], adapter_id=name) == (
                "ADAPTER_NOT_FOUND"
            )
            return
        named = {} if name is None else {name: 1.0}
        self._request(named, seed, num_tokens, leave_after)

    @precondition(lambda self: self.names)
    @rule(data=st.data(), seeds=st.lists(seed, min_size=2, max_size=MAX_LIVE))
    def generate_many(self, data: st.DataObject, seeds: list[int]) -> None:
        for seed in seeds:
            self.nobody_waits_for_ever()
            name = data.draw(st.sampled_from(sorted(self.names)))
            self.generate(name=name, seed=seed, num_tokens=MAX_TOKENS, leave_after=None)

    @precondition(lambda self: len(self.names) >= 2)
    @rule(data=st.data(), seed=seed, num_tokens=num_tokens, leave_after=leave_after)
    def generate_blend(
        self, data: st.DataObject, seed: int, num_tokens: int, leave_after: int | None
    ) -> None:
        self._count("generate with a blend")
        names = data.draw(
            st.lists(st.sampled_from(sorted(self.names)), min_size=2, max_size=3, unique=True)
        )
        blend = {name: data.draw(st.sampled_from(WEIGHTS)) for name in names}
        contents = [self.names[name].content for name in names]
        ranks = sum(-(-content.rank // 16) * 16 for content in contents)
        if ranks > self.world.max_rank or not all(content.can_be_blended for content in contents):
            assert self._answer(self.client.complete, token_ids=[1], blend=blend) == "INVALID_FIELD"
        else:
            self._request(blend, seed, num_tokens, leave_after)

    @precondition(lambda self: any(named.pinned for named in self.names.values()))
    @rule()
    def look_at_pins(self) -> None:
        self._count("look at the pinned")
        for name, named in self.names.items():
            if named.pinned:
                is_here = self.client.get_adapter(name).residency is Residency.DEVICE
                assert is_here or not named.stays, f"{name} is pinned, and had to go"
                named.stays = is_here

    @precondition(lambda self: self.live)
    @rule()
    def await_oldest(self) -> None:
        self._count("wait for a request")
        self._judge(self.live.pop(0))

    @rule(is_due=st.integers(0, 4))
    def settle(self, is_due: int) -> None:
        if is_due:  # else there would never be many at once
            return
        self._count("wait for all")
        self._judge_all()
        self._check_idle()

    @rule(kill=st.booleans(), is_due=st.integers(0, 3))
    def restart(self, kill: bool, is_due: int) -> None:
        if is_due:  # seldom: it takes as long as a hundred of the others
            return
        self._count("kill and restart" if kill and self.host.can_be_killed else "restart")
        self.client.close()
        self.world.num_evicted += self.host.num_evicted()
        self.host.restart(kill=kill)
        self.client = Client(self.host.target)
        for request in self.live:
            self._check_said(request, request.ended.result(SECONDS))
        self.live.clear()
        for named in self.names.values():
            named.stays = False
        self._check_names()

    # What must hold.

    @invariant()
    def nobody_waits_for_ever(self) -> None:
        if len(self.live) == MAX_LIVE:
            self._judge(self.live.pop(0))

    def teardown(self) -> None:
        try:
            self._judge_all()
            self._check_idle()
            self.world.num_evicted += self.host.num_evicted()
        finally:
            self.client.close()
            self.host.close()
            self.pool.shutdown()

    def _check_names(self) -> None:
        found = {adapter.adapter_id: adapter for adapter in self.client.list_adapters()}
        assert found.keys() == self.names.keys()
        for name, named in self.names.items():
            assert found[name].version == self.world.solo.version(named.content)
            assert found[name].pinned is named.pinned
            assert found[name].state.name == "READY"

    def _check_idle(self) -> None:
        """Nothing is held for requests that are over."""
        eventually(lambda: not any(a.references for a in self.client.list_adapters()))
        self.host.check_idle()
        self._check_names()

    def _judge_all(self) -> None:
        while self.live:
            self._judge(self.live.pop(0))

    def _judge(self, request: Request) -> None:
        ended = request.ended.result(SECONDS)
        if ended.error is not None:
            # Beside pins there may be no room for it, and none at all for a blend's members.
            assert self.has_pinned or len(request.parts) > 1, f"{request.parts}: {ended.error}"
            assert ended.error in ("EXCEEDS_KV_CAPACITY", "OUT_OF_MEMORY")
        elif request.leave_after is None:
            assert ended.is_whole
            assert len(ended.token_ids) == request.num_tokens
        self._check_said(request, ended)

    def _check_said(self, request: Request, ended: Ended) -> None:
        """Whatever came is what these adapters say when they are alone."""
        self.world.answers[ended.error or ("whole" if ended.is_whole else "left")] += 1
        spoken = self.world.solo.speak(request.parts, request.prompt, request.num_tokens)
        assert spoken.agrees_with(ended.token_ids), f"{request.parts}: {ended.token_ids}"

    def _publish(self, name: str, content: Content) -> None:
        named = self.names.setdefault(name, Named(content))
        if named.content != content:
            named.content, named.stays = content, False
        self.halves.discard((name, content))

    def _request(
        self,
        named: Mapping[str, float],
        seed: int,
        num_tokens: int,
        leave_after: int | None,
    ) -> None:
        prompt = tuple((seed * 37 + i * (seed + 3)) % 251 for i in range(1 + seed * 5))
        assert len(prompt) <= MAX_PROMPT
        request = Request(self._parts(named), prompt, num_tokens, leave_after)
        request.ended = self.pool.submit(request.run, self.client, named)
        self.live.append(request)
        assert request.started.wait(SECONDS), "a request did not begin"
        if request.versions or not request.ended.done():
            expected = sorted(self.world.solo.version(self.names[name].content) for name in named)
            assert sorted(request.versions) == expected

    def _parts(self, named: Mapping[str, float]) -> Parts:
        """In the engine's own order; two names of one content are one."""
        weights: defaultdict[Content, float] = defaultdict(float)
        for name, weight in named.items():
            weights[self.names[name].content] += weight
        return tuple(sorted(weights.items(), key=lambda part: self.world.solo.version(part[0])))

    def _answer(self, call: Callable[..., object], *args: object, **kwargs: object) -> str | None:
        """The reason of the call's refusal; None: it was not refused."""
        try:
            call(*args, **kwargs)
        except LoraplexError as error:
            self.world.answers[error.reason or error.code.name] += 1
            return error.reason
        return None

    def _count(self, what: str) -> None:
        self.world.done[what] += 1
