"""The table of reasons and the tree of errors agree with each other and with the contract."""

import re

import pytest
from grpc import StatusCode
from loraplex.errors import (
    REASONS,
    AdapterInvalidError,
    InvalidRequestError,
    LoraplexError,
    ModelError,
    RequestError,
    StartupError,
    not_implemented,
)


def test_every_row_is_complete_and_found_by_its_name() -> None:
    for name, reason in REASONS.items():
        assert name == reason.name
        assert re.fullmatch(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*", name)
        assert reason.code not in (StatusCode.OK, StatusCode.UNKNOWN, StatusCode.CANCELLED)
        assert reason.when
        assert "|" not in reason.when  # it becomes a cell of a table


@pytest.mark.parametrize(
    ("error", "reason", "code", "field"),
    [
        (
            InvalidRequestError("sampling.top_p", "is odd"),
            *("INVALID_FIELD", StatusCode.INVALID_ARGUMENT, "sampling.top_p"),
        ),
        (
            AdapterInvalidError("lora_A", "is NaN"),
            *("ADAPTER_INVALID", StatusCode.INVALID_ARGUMENT, "lora_A"),
        ),
        (not_implemented("blend"), "NOT_IMPLEMENTED", StatusCode.UNIMPLEMENTED, "blend"),
        (RequestError("DRAINING", "bye"), "DRAINING", StatusCode.UNAVAILABLE, None),
    ],
)
def test_errors_carry_their_row(
    error: RequestError, reason: str, code: StatusCode, field: str | None
) -> None:
    assert (error.reason.name, error.code, error.field) == (reason, code, field)
    assert isinstance(error, LoraplexError)
    assert str(error) == error.message


def test_an_adapters_error_names_the_tensor() -> None:
    assert AdapterInvalidError("lora_A", "is NaN").message == "lora_A: is NaN"


def test_startup_errors_are_no_request_errors() -> None:
    assert issubclass(ModelError, StartupError)
    assert not issubclass(StartupError, RequestError)


def test_an_unknown_reason_is_our_own_mistake() -> None:
    with pytest.raises(KeyError):
        RequestError("NO_SUCH_REASON", "x")
