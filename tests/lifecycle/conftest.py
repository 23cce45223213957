"""How long the lives are, and where it is written down."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lifecycle.run_log import RunLog


@pytest.fixture(scope="session")
def operations(pytestconfig: pytest.Config) -> int:
    number: int = pytestconfig.getoption("operations")
    return number


@pytest.fixture(scope="session")
def run_log(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> Iterator[RunLog]:
    path: Path | None = pytestconfig.getoption("run_log")
    log = RunLog(path)
    yield log
    log.save(passed=request.session.testsfailed == 0)
