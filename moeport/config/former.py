"""What configs of earlier versions say that those of today do not."""

from dataclasses import dataclass, replace

from moeport.config.tree import Node, merge, without

_CAPACITY = "model.moe.capacity"


@dataclass(frozen=True)
class FormerDefault:
    """A value that was a default. Configs with every key hold it, also where it has no effect."""

    option: str
    value: str | float
    selector: str
    values: tuple[str, ...]
    """The values of the selector under which the option has an effect."""


FORMER_DEFAULTS = (
    FormerDefault(f"{_CAPACITY}.probability", "exact", f"{_CAPACITY}.policy", ("locmoe",)),
    FormerDefault(f"{_CAPACITY}.rule", "controller", f"{_CAPACITY}.policy", ("locmoe_plus",)),
    FormerDefault(f"{_CAPACITY}.quantile", 0.9, f"{_CAPACITY}.delta", ("quantile",)),
)
FORMER_NAMES = {(f"{_CAPACITY}.probability", "exact"): "independent"}
"""Values that have another name since, by key and former name. Only the config of a run that was recorded may have
them; other configs are refused, with a hint."""


def without_former_defaults(root: Node) -> Node:
    """The tree without former defaults that have no effect, as its selector says, which must be given."""
    return without(root, [tuple(each.option.split(".")) for each in FORMER_DEFAULTS if _is_idle(root, each)])


def _is_idle(root: Node, former: FormerDefault) -> bool:
    option, selector = root.find(*former.option.split(".")), root.find(*former.selector.split("."))
    if option is None or selector is None:
        return False
    return option.value == former.value and selector.value not in former.values


def with_names_of_today(root: Node) -> Node:
    """The tree with today's names of values in place of their former ones."""
    for (path, name), today in FORMER_NAMES.items():
        parts = path.split(".")
        node = root.find(*parts)
        if node is not None and node.value == name:
            renamed = replace(node, value=today)
            for part in reversed(parts):
                renamed = Node({part: renamed}, root.place, root.key_place, "")
            root = merge(root, renamed)
    return root
