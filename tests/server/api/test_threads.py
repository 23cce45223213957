"""Work in a thread outlives the cancel of its caller, and the caller waits for it."""

import asyncio
import threading

import pytest
from loraplex.api.threads import in_thread


def test_results_and_errors_come_back() -> None:
    assert asyncio.run(in_thread(int, "ff", base=16)) == 255
    with pytest.raises(ValueError, match="invalid literal"):
        asyncio.run(in_thread(int, "x"))


@pytest.mark.parametrize("fails", [False, True])
def test_a_cancelled_caller_waits_for_the_thread(fails: bool) -> None:
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
            await in_thread(work)
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
