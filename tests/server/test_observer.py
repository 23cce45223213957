"""The step-by-step record."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest
from loraplex.engine.engine import StepRecord
from loraplex.observer import StepLog

RECORD = StepRecord(1, 2.0, 0.5, ("r1", "r2"), (None, "abc"), (1, 7), (0, 0), 0, 2, 0)


def test_a_step_is_a_line_at_once(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    log = StepLog(path)
    log.write(RECORD)
    assert path.read_text() == json.dumps(asdict(RECORD)) + "\n"
    log.write(RECORD)
    log.close()
    assert len(path.read_text().splitlines()) == 2


def test_a_full_disk_ends_the_record_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    log = StepLog(Path("/dev/full"))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            log.write(RECORD)
        log.close()
    assert [record.getMessage() for record in caplog.records] == [
        "the step log ends here: [Errno 28] No space left on device"
    ]
