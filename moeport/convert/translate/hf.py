"""config.json of the Hugging Face families that `moeport convert` knows, judged key by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeport.convert.config_in import fixed_values, settings_of
from moeport.convert.family import family_of
from moeport.convert.folder import read_object
from moeport.convert.keys import CARRIED, shown
from moeport.convert.translate.draft import Draft, Rule, Typed

TYPED: Typed = {}
RULES: dict[str, Rule] = {}
PREFIXES: dict[str, str] = {}


def read_file(path: Path) -> dict[str, Any]:
    """The keys of a config.json, or of that of a folder."""
    return read_object(path / "config.json" if path.is_dir() else path)


def combine(draft: Draft) -> None:
    """Judge all keys. Raises UserError for another family, and for values that contradict each other."""
    family = family_of(str(draft.get("model_type")))
    fixed = fixed_values(family, draft.values)
    known = set(family.defaults) | {"rope_parameters", "rope_scaling"} | set(fixed) | CARRIED
    unexpressed = {key for key, wanted in fixed.items() if draft.get(key, wanted) != wanted}
    strangers = {key for key in draft.values if key not in known}
    settings = settings_of(family, draft.values, "config.json", unexpressed | strangers)
    draft.sections["model"] = settings.model
    draft.put("data.sequence_length", settings.sequence_length)
    for key in draft.values:
        if key in unexpressed:
            draft.tell(key, "not expressible", f"moeport has {shown(fixed[key])} only")
        elif key in strangers:
            continue
        elif key in CARRIED:
            draft.tell(key, "ignored", "changes neither logits nor training")
        elif key in fixed:
            draft.tell(key, "ignored", "as here")
        else:
            draft.tell(key, "understood", PLACES.get(key, "model"))


PLACES = {"max_position_embeddings": "data.sequence_length"}
"""Where keys go, if not to `model`; docs/hugging-face.md has the table."""
