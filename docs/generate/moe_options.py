"""The keywords of `moeport.torch.MoE` that are keys of `model.moe`, as a TypedDict."""

import json
import textwrap
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from moeport.config.keys import subsection, variants
from moeport.config.model import MoELayerConfig
from moeport.config.tree import shown

POSITIONAL = ("num_experts", "expert_hidden")
"""Keys that MoE has as parameters of its own, since it has no default for them."""
BY_NAME = ("router", "capacity")
"""Sections that MoE takes by name too."""


def fields() -> str:
    """The body of the TypedDict: a line and a docstring for each key."""
    hints = get_type_hints(MoELayerConfig)
    return "\n".join(_field(name, hints[name]) for name in MoELayerConfig.model_fields if name not in POSITIONAL)


def _field(name: str, hint: Any) -> str:
    field = MoELayerConfig.model_fields[name]
    is_section = subsection(field) is not None or bool(variants(field))
    kind = "Mapping[str, Any] | None" if is_section else _shown(hint)
    default = "" if is_section or field.default is None else f" Default: {shown(field.default)}."
    text = f'"""{" ".join((field.description or "").split())}{default}"""'
    lines = [f"{name}: {'str | ' if name in BY_NAME else ''}{kind}", *textwrap.wrap(text, 116)]
    return textwrap.indent("\n".join(lines), "    ")


def _shown(hint: Any) -> str:
    """A type as it is written in source."""
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(_shown, get_args(hint)))
    if get_origin(hint) is Literal:
        return f"Literal[{', '.join(map(json.dumps, get_args(hint)))}]"
    return "None" if hint is NoneType else str(hint.__name__)
