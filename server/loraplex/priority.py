"""Threads that give way to those that serve."""

import os
import sys
from contextlib import suppress
from threading import get_native_id

_STEPS = 10
"""A tenth of the share of a core that others get who want it too; all that nobody wants."""


def give_way() -> None:
    """The calling thread steps back behind the others, as far as the system lets it."""
    if sys.platform != "linux":  # elsewhere it would be the whole process
        return
    thread = get_native_id()
    with suppress(OSError):
        niceness = os.getpriority(os.PRIO_PROCESS, thread)
        os.setpriority(os.PRIO_PROCESS, thread, min(niceness + _STEPS, 19))
