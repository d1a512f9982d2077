"""What differs between two sides besides their tensors: config, versions, environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeport.parity.recording import Recording
from moeport.parity.result import Difference

VARIANT_KEYS = ("backend.name", "backend.device", "backend.dtype", "run.", "data.cache_dir")
"""Config keys whose differences are not reported."""
ELSEWHERE = (
    *("run.", "backend.", "comm.", "parallelism.", "checkpoint.", "metrics.", "data.source.", "data.cache_dir"),
    *("data.tokenizer.path", "training.evaluation", "training.gradient_accumulation"),
    *("training.activation_checkpointing", "data.sources", "data.domains"),
)
"""Config keys that say where and how something is computed or kept, not what: all others change what is trained."""
SHOWN = 3
"""Maximum number of keys in a sentence."""


def differences(a: Recording, b: Recording) -> list[Difference]:
    """What differs in config, versions and environment.

    Leaves out the config keys that define a variant, the whole config if one side has none, and kernels if the
    backends differ.
    """
    found = _unequal("config", a.config, b.config, VARIANT_KEYS) if a.config and b.config else []
    sections = {"versions": "version", "variables": "variable", "kernels": "kernel"}
    plain = [{k: v for k, v in side.environment.items() if k not in sections} for side in (a, b)]
    found += _unequal("", plain[0], plain[1])
    if a.environment.get("backend") != b.environment.get("backend"):
        del sections["kernels"]
    for section, word in sections.items():
        found += _unequal(word, *(side.environment.get(section, {}) for side in (a, b)))
    return found


def training_keys(found: Sequence[Difference], within: str = "") -> str:
    """A clause on keys of the config that change what is trained and differ; empty if there are none.

    Args:
        found: all differences.
        within: only keys that begin so.
    """
    keys = [(d.key.removeprefix("config "), d) for d in found if d.key.startswith("config ")]
    shown = [f"{key} ({d.a}, {d.b})" for key, d in keys if not key.startswith(ELSEWHERE) and key.startswith(within)]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return f"the configs differ in {', '.join(shown[:SHOWN])}{more}" if shown else ""


def _unequal(word: str, a: Mapping[str, Any], b: Mapping[str, Any], without: tuple[str, ...] = ()) -> list[Difference]:
    """Leaves of two nested mappings that differ."""
    first, second = _leaves(a), _leaves(b)
    keys = [key for key in first | second if first.get(key) != second.get(key) and not key.startswith(without)]
    return [
        Difference(f"{word} {key}".strip(), *(str(side.get(key, "\N{EN DASH}")) for side in (first, second)))
        for key in keys
    ]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
