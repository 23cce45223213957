"""Work in a thread outlives the cancel of its caller, and the caller waits for it."""

import asyncio
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from loraplex.api.threads import Background


@pytest.fixture
def background() -> Iterator[Background]:
    with closing(Background(num_threads=1)) as threads:
        yield threads


def test_results_and_errors_come_back(background: Background) -> None:
    assert asyncio.run(background.run(int, "ff", base=16)) == 255
    with pytest.raises(ValueError, match="invalid literal"):
        asyncio.run(background.run(int, "x"))


@pytest.mark.parametrize("fails", [False, True])
def test_a_cancelled_caller_waits_for_the_thread(fails: bool, background: Background) -> None:
    begun, go = threading.Event(), threading.Event()
    order: list[str] = []

    def work() -> None:
        begun.set()
        assert go.wait(10)
        order.append("work")
        if fails:
            raise ValueError("nobody hears this")

    async def caller() -> None:
        try:
            await background.run(work)
        finally:
            order.append("clean up")

    async def main() -> None:
        task = asyncio.ensure_future(caller())
        await asyncio.to_thread(begun.wait, 10)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.02)
            assert not task.done()
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert order == ["work", "clean up"]


def _priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_background_work_gives_way_and_nothing_else_does() -> None:
    background = Background(num_threads=1)

    async def priorities() -> tuple[int, int, int]:
        return await background.run(_priority), await asyncio.to_thread(_priority), _priority()

    behind, beside, here = asyncio.run(priorities())
    assert beside == here
    assert (behind > here) == (sys.platform == "linux")  # nowhere else have threads priorities
    background.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("loraplex-background")]


@pytest.mark.parametrize("of_server", [15, 19])
def test_in_a_server_that_gives_way_itself_they_give_way_as_far_as_they_can(of_server: int) -> None:
    async def behind() -> int:
        return await background.run(_priority)

    def serve() -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), of_server)
        found.append(asyncio.run(behind()))

    found: list[int] = []
    background = Background(num_threads=1)
    server = threading.Thread(target=serve)
    server.start()
    server.join()
    background.close()
    assert found == [19] or sys.platform != "linux"
