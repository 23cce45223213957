"""Stop strings over a text that arrives in pieces."""

from collections.abc import Sequence


class StopBuffer:
    """Passes text on, holding back what might begin a stop string.

    The match that is complete first wins, the longest of those that end together, so what is found
    does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops)
        self._stops = tuple(stops)
        self._longest_held = max(map(len, stops), default=1) - 1
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """What may be sent now, and the stop string that ends the text, once there is one."""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, stop = min(found)
            self._held = ""
            return text[:at], stop
        held = self._num_held(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest_held, len(text)), 0, -1):
            tail = text[len(text) - length :]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
