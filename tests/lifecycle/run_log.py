"""What a long run of the lifecycle tests did, as a file to keep."""

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(slots=True)
class RunLog:
    """Mutable: `_parts`, a table for each kind of server."""

    path: Path | None
    _started: float = field(default_factory=time.monotonic)
    _parts: list[str] = field(default_factory=list)

    def add(
        self, where: str, done: Mapping[str, int], answers: Mapping[str, int], num_evicted: int
    ) -> None:
        rows = [f"| {what} | {number} |" for what, number in sorted(done.items())]
        ends = ", ".join(f"{answer} {number}" for answer, number in sorted(answers.items()))
        self._parts += [
            f"## The server in {where}: {sum(done.values())} operations",
            "",
            "| operation | times |",
            "|---|---|",
            *rows,
            "",
            f"How requests ended, and what was refused: {ends}. {num_evicted} times an adapter had "
            "to leave the device for another or for a request's KV.",
            "",
        ]

    def save(self, passed: bool) -> None:
        if self.path is None or not self._parts:
            return
        minutes = (time.monotonic() - self._started) / 60
        verdict = "no invariant was violated" if passed else "**an invariant was violated**"
        head = [
            "# Random lives of a server",
            "",
            f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, "
            f"{minutes:.0f} minutes: {verdict}. Made by `make fuzz`.",
            "",
        ]
        self.path.write_text("\n".join(head + self._parts))
