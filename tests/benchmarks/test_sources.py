"""What of a source counts for the compile report's hash."""

from sources import code_of, source_hash

WRITTEN = '''"""What it is for."""

LIMIT = 3  # because
"""What it limits."""


def f(x: int) -> str:
    """What it does.

    And how.
    """
    # First:
    y = "# not a comment"

    return f"{x} {y}"
'''


def test_only_code_counts() -> None:
    assert code_of(WRITTEN).splitlines() == [
        "LIMIT = 3",
        "def f(x: int) -> str:",
        '    y = "# not a comment"',
        '    return f"{x} {y}"',
    ]


def test_a_changed_value_is_seen() -> None:
    assert code_of(WRITTEN) != code_of(WRITTEN.replace("3", "4"))


def test_the_hash_is_the_same_twice() -> None:
    assert source_hash() == source_hash()
