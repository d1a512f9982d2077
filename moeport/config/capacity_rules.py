"""Rules about estimates of the expert capacity."""

from moeport.config.rule import Rule

MOST_GIVEN_UP = 0.25
"""The share of an expert's own tokens up to which a rule that counts rivals may give them up. With more, tokens without
a preferred direction can ask for fewer rows than tokens that lie on the gate rows: with two experts they do."""
_CAPACITY = "model.moe.capacity"
_READS = (f"{_CAPACITY}.delta", f"{_CAPACITY}.policy", f"{_CAPACITY}.rule")


def _counts(policy: str, rule: str) -> bool:
    """Whether the capacity is a number of tokens that are at least as near as those that an expert is to keep."""
    return policy == "locmoe_plus" and rule != "delta_max"


def _has_effect(quantile: float | None, delta: str | None, policy: str, rule: str) -> bool:
    estimated = policy in ("locmoe", "locmoe_plus")
    return quantile is None or not estimated or delta is not None or _counts(policy, rule)


def _is_low(quantile: float | None, delta: str | None, policy: str, rule: str) -> bool:
    of_kept = _counts(policy, rule) and delta in (None, "quantile")
    return not of_kept or quantile is None or quantile <= MOST_GIVEN_UP


CAPACITY_RULES = (
    Rule(
        (f"{_CAPACITY}.quantile", *_READS),
        _has_effect,
        f"has no effect while {_CAPACITY}.delta is {{1}}",
        f"{_CAPACITY}.delta quantile, or this key left out",
    ),
    Rule(
        (f"{_CAPACITY}.quantile", *_READS),
        _is_low,
        "is the share of an expert's own tokens that the capacity gives up: with a high one, rule {3} asks for few rows"
        " because tokens are dropped, whether or not they gather around the gate rows",
        f"at most {MOST_GIVEN_UP}, such as 0.1; or, to drop that many tokens, policy factor with a small factor",
        recorded=True,
    ),
    Rule(
        _READS,
        lambda delta, policy, rule: delta not in ("mean", "maximum") or not _counts(policy, rule),
        lambda delta, policy, rule: (
            f"gives up {'about half' if delta == 'mean' else 'all but one'} of an expert's own tokens: with it, rule "
            f"{rule} asks for few rows because tokens are dropped, whether or not they gather around the gate rows"
        ),
        "minimum, or quantile with a low model.moe.capacity.quantile",
        recorded=True,
    ),
)
