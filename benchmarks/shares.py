"""How much of a server each adapter got. Pure."""

from collections.abc import Iterable, Sequence

from measures import name_of, ttft
from outcome import Outcome

INPUT_WEIGHT, OUTPUT_WEIGHT = 1, 2
"""Of a prompt's token and of a generated one, in a server's service.

The weights of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024).
"""


def service(outcome: Outcome, begin: float, end: float) -> int:
    """Weighted tokens; a prompt's are all served at the first token."""
    prompt = len(outcome.request.token_ids) if outcome.arrivals else 0
    was_prefilled = prompt and begin <= outcome.arrivals[0] < end
    generated = outcome.tokens_between(begin, end)
    return INPUT_WEIGHT * prompt * bool(was_prefilled) + OUTPUT_WEIGHT * generated


def demand_served(outcomes: Iterable[Outcome], begin: float, end: float) -> dict[str, float]:
    """By adapter: tokens that came in this span, over all that were asked for by requests that
    were due in it."""
    asked: dict[str, int] = {}
    served: dict[str, int] = {}
    for outcome in outcomes:
        if begin <= outcome.due <= end:
            name = name_of(outcome)
            asked[name] = asked.get(name, 0) + outcome.request.max_tokens
            served[name] = served.get(name, 0) + outcome.tokens_between(begin, end)
    return {name: served[name] / asked[name] for name in asked}


def first_tokens(outcomes: Sequence[Outcome], end: float) -> list[float]:
    """Milliseconds from being due; a request that never got a token has waited until the end."""
    found = ((outcome, ttft(outcome)) for outcome in outcomes)
    return [(end - each.due) * 1e3 if waited is None else waited for each, waited in found]
