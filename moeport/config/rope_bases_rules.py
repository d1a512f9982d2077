"""Rules about the rotary bases of heads."""

from moeport.config.model import MOST_COMPARED, candidates
from moeport.config.rule import Effect, Rule

_HEADS = "model.attention.num_heads"
_KIND = "model.attention.kind"
_GROUPS = "model.attention.num_kv_heads"
_BASES = "model.attention.rope_bases"

BASES_RULES = (
    Rule(
        (f"{_BASES}.kind", _KIND),
        lambda bases, kind: bases == "none" or kind == "grouped",
        "gives heads different bases, but in multi-head latent attention all heads share the rotated part of the key",
        "none, and model.attention.rope_base",
    ),
    Rule(
        (f"{_BASES}.values", f"{_BASES}.kind", _GROUPS, _HEADS, _KIND),
        lambda values, kind, groups, heads, attention: (
            kind != "list" or attention == "mla" or len(values) == (groups or heads)
        ),
        lambda values, kind, groups, heads, attention: f"has {len(values)} bases for {groups or heads} key-value heads",
        lambda values, kind, groups, heads, attention: (
            f"{groups or heads}, one per key-value head; the query heads that read it share its base"
        ),
    ),
    Rule(
        (f"{_BASES}.high", f"{_BASES}.low"),
        lambda high, low: high >= low,
        f"is below {_BASES}.low = {{1}}",
        "at least {1}",
    ),
    Rule(
        (f"{_BASES}.step", f"{_BASES}.low", f"{_BASES}.high", f"{_BASES}.kind", _GROUPS, _HEADS),
        lambda step, low, high, kind, groups, heads: (
            kind != "peak_valley" or high < low or candidates(low, high, step) >= (groups or heads)
        ),
        lambda step, low, high, kind, groups, heads: (
            f"makes {candidates(low, high, step)} candidates for {groups or heads} key-value heads"
        ),
        lambda step, low, high, kind, groups, heads: f"a smaller one, or {_BASES}.low and {_BASES}.high further apart",
    ),
    Rule(
        (f"{_BASES}.positions", f"{_BASES}.spacing"),
        lambda positions, spacing: positions > 2 * spacing,
        f"leaves no distance with {_BASES}.spacing = {{1}} others on either side",
        lambda positions, spacing: f"more than {2 * spacing}",
    ),
    Rule(
        (f"{_BASES}.step", f"{_BASES}.low", f"{_BASES}.high", f"{_BASES}.positions", f"{_BASES}.kind"),
        lambda step, low, high, positions, kind: (
            kind != "peak_valley" or high < low or candidates(low, high, step) * positions <= MOST_COMPARED
        ),
        lambda step, low, high, positions, kind: (
            f"makes {candidates(low, high, step):,} candidates, to be compared at {_BASES}.positions = {positions:,}"
        ),
        f"a larger one, or fewer positions: at most {MOST_COMPARED:,} candidates times positions",
    ),
)

BASES_EFFECTS = (
    Effect("model.attention.rope_base", f"{_BASES}.kind", ("none",)),
    Effect(f"{_BASES}.values", f"{_BASES}.kind", ("list",)),
    *(
        Effect(f"{_BASES}.{option}", f"{_BASES}.kind", ("uniform", "peak_valley"))
        for option in ("low", "high", "order")
    ),
    *(
        Effect(f"{_BASES}.{option}", f"{_BASES}.kind", ("peak_valley",))
        for option in ("step", "first_position", "positions", "spacing", "pairing")
    ),
)
