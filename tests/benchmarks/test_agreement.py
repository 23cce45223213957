"""Who ignores its adapters, on made-up tokens."""

from agreement import Agreement, Leading, Said, agreements

PEFT = Said(base=[(1, 2, 3), (4, 5, 6)], mixed=[(7, 8, 9), (4, 5, 7)])


def test_leading_tokens_are_counted_up_to_the_first_that_differs() -> None:
    other = Said(base=[(1, 2, 9), (4, 5, 6)], mixed=[(7, 1, 9), (4, 5, 6)])

    assert agreements({"peft": PEFT, "other": other}, ["peft"]) == {
        "peft": Agreement({"peft": Leading(3.0, 3.0)}, changed=2),
        "other": Agreement({"peft": Leading(2.5, 1.5)}, changed=1),
    }


def test_saying_the_same_with_adapters_as_without_gives_it_away() -> None:
    deaf = Said(base=PEFT.base, mixed=list(PEFT.base))
    found = agreements({"peft": PEFT, "deaf": deaf}, ["peft"])

    assert found["deaf"].ignores_adapters
    assert not found["peft"].ignores_adapters


def test_a_system_that_takes_no_adapters_is_compared_on_its_base() -> None:
    plain = agreements({"peft": PEFT, "plain": Said(PEFT.base, None)}, ["peft"])["plain"]

    assert plain == Agreement({"peft": Leading(3.0, None)}, changed=None)
    assert not plain.ignores_adapters
