"""A key that takes several values, of which each config keeps its best."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moeport.config.schema import Config
from moeport.config.tree import shown
from moeport.errors import UserError, choices
from moeport.training.run_dir import leaves

ChosenOn = Literal["first", "all"]
"""Whether the best value has the lowest validation loss on the first seed, or the lowest mean over all seeds."""
REFUSED = {
    "training.seed": "use --seeds",
    "training.steps": "a longer run has the lower loss; compare runs of one length",
    "data": "losses on other data cannot be compared",
    "run": "it changes nothing that is measured",
    "checkpoint": "it changes nothing that is measured",
    "metrics": "it changes nothing that is measured",
}
"""Keys and sections that are not swept, and why."""
EXPECTED = "expected KEY=VALUE,VALUE... or NAME:KEY=VALUE,VALUE... as in --sweep optimizer.learning_rate=1e-3,2e-3"


@dataclass(frozen=True)
class Sweep:
    """One key and the values to try."""

    key: str
    values: tuple[str, ...]
    """As the user wrote them."""


@dataclass(frozen=True)
class Value:
    """One value of a sweep, in the config that it makes."""

    shown: str
    """As the resolved config has it, so that 1e-3 and 0.001 are one."""
    config: Config


def parse_sweeps(given: Sequence[str], names: Collection[str]) -> dict[str, Sweep]:
    """The sweep of each config, by name; configs without one are left out.

    Args:
        given: KEY=V,V for all configs, or NAME:KEY=V,V for one, which goes before that for all.
        names: those of the configs.

    Raises UserError for anything else.
    """
    for_all: dict[str, Sweep] = {}
    own: dict[str, Sweep] = {}
    for text in given:
        place, equals, listed = text.partition("=")
        name, colon, key = place.partition(":") if ":" in place else ("", "", place)
        values = tuple(dict.fromkeys(value.strip() for value in listed.split(",")))
        if not (equals and key and all(values)):
            raise UserError(f"--sweep {text}: not a key with its values; {EXPECTED}")
        if colon and name not in names:
            raise UserError(f"--sweep {text}: no config is named {name!r}; {choices(name, names)}")
        for section, why in REFUSED.items():
            if f"{key}.".startswith(f"{section}."):
                raise UserError(f"--sweep {text}: {key} cannot be swept: {why}")
        found = {name: Sweep(key, values)} if colon else dict.fromkeys(names, Sweep(key, values))
        target = own if colon else for_all
        if found.keys() & target.keys():
            raise UserError(f"--sweep {text}: a config sweeps one key, and another --sweep names one; leave one out")
        target |= found
    return for_all | own


def value_of(config: Config, key: str) -> str:
    """What a config has at a key.

    Raises UserError if that is a section or a list, which no value can be made of.
    """
    tree: Any = leaves(config.model_dump(mode="json"))
    if key not in tree or isinstance(tree[key], list):
        raise UserError(f"--sweep {key}: is not a key with a single value; {EXPECTED}")
    return shown(tree[key])


def folder_suffix(key: str, value: str) -> str:
    """The end of the name of a run folder, for a value that is not the config's own."""
    return "-" + re.sub(r"[^\w.+-]", "_", f"{key.rpartition('.')[2]}-{value}")
