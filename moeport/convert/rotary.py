"""rope_theta, rope_scaling and rope_parameters: how config.json says which rotary positions a model has."""

from __future__ import annotations

from statistics import median_low
from typing import Any

from moeport.config.model import ModelConfig
from moeport.convert.keys import Keys
from moeport.errors import UserError
from moeport.model.rope_bases import bases_of

ORIGINAL = "original_max_position_embeddings"
OPTIONS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        ORIGINAL: "original_positions",
    },
    "yarn": {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        ORIGINAL: "original_positions",
    },
}
"""By type, their options and ours."""
LATENT_OPTIONS = {"mscale": "mscale", "mscale_all_dim": "mscale_all_dim"}
"""Further options of yarn, in families with latent attention."""
_OPTIONAL = {"beta_fast", "beta_slow", "attention_factor", *LATENT_OPTIONS}


def rotary_settings(keys: Keys) -> dict[str, Any]:
    """rope_base and rope_scaling of `model.attention`.

    Transformers 5 writes one object rope_parameters, older versions rope_theta and rope_scaling.

    Raises UserError for what moeport does not have, and for keys that contradict each other.
    """
    keys.asked |= {"rope_theta", "rope_scaling", "rope_parameters"}
    sections = {key: keys.values[key] for key in ("rope_parameters", "rope_scaling") if keys.values.get(key)}
    for key, section in sections.items():
        if not isinstance(section, dict):
            raise UserError(f"{keys.place}: {key} is {section!r}; expected an object or null")
    bases = [section["rope_theta"] for section in sections.values() if "rope_theta" in section]
    bases += [keys.values["rope_theta"]] if "rope_theta" in keys.values else []
    if any(type(base) not in (int, float) or base != bases[0] for base in bases):
        raise UserError(f"{keys.place}: rope_theta is {' and '.join(map(str, bases))}; expected one number")
    found: dict[str, Any] = {"rope_base": float(bases[0]) if bases else keys.family.base}
    scalings = [_scaling(keys, key, section) for key, section in sections.items()]
    if any(scaling != scalings[0] for scaling in scalings):
        raise UserError(f"{keys.place}: rope_parameters and rope_scaling differ; remove one")
    return found | ({"rope_scaling": scalings[0]} if scalings and scalings[0] else {})


def rotary_keys(model: ModelConfig, is_latent: bool) -> dict[str, Any]:
    """rope_parameters of a model, for a family with latent attention or another one; with several bases, of the middle
    one.
    """
    scaling = model.attention.rope_scaling
    kind = "default" if scaling.type == "none" else scaling.type
    values = {theirs: getattr(scaling, ours) for theirs, ours in _known(kind, is_latent).items()}
    values = {name: value for name, value in values.items() if value is not None}
    return {"rope_type": kind, "rope_theta": median_low(bases_of(model)), **values}


def rotary_canonical(model: ModelConfig) -> dict[str, Any]:
    """The settings of rotary positions that have an effect."""
    scaling, bases = model.attention.rope_scaling, bases_of(model)
    many = len(set(bases)) > 1
    base = {"attention.rope_bases": list(bases) if many else f"one rope_theta, {bases[0]}"}
    kind = "default" if scaling.type == "none" else scaling.type
    options = {ours: getattr(scaling, ours) for ours in _known(kind, is_latent=True).values()}
    return {**base, "attention.rope_scaling.type": scaling.type} | {
        f"attention.rope_scaling.{name}": value for name, value in options.items()
    }


def _scaling(keys: Keys, key: str, section: dict[str, Any]) -> dict[str, Any]:
    kind = section.get("rope_type", section.get("type", "default"))
    known = _known(kind, keys.family.is_latent) if isinstance(kind, str) and kind in OPTIONS else None
    options = {name: value for name, value in section.items() if name not in ("rope_type", "type", "rope_theta")}
    whole = options.pop("partial_rotary_factor", 1.0) == 1.0
    if known is None or options.keys() - known.keys() or not whole:
        raise UserError(
            f"{keys.place}: {key} is {section}: moeport has rotary positions of the types {', '.join(OPTIONS)}, for "
            "the whole width of a head, with the options that transformers documents for them"
        )
    missing = known.keys() - options.keys() - _OPTIONAL
    numbers = all(type(value) in (int, float) for value in options.values() if value is not None)
    if missing or not numbers:
        wanted = ", ".join(name for name in known if name not in _OPTIONAL)
        raise UserError(f"{keys.place}: {key} is {section}; expected the numbers {wanted}")
    if kind == "default":
        return {}
    given = [options.get(name) for name in LATENT_OPTIONS]
    if not all(given):
        if given[1] or given[0] not in (None, 0, 1):
            raise UserError(
                f"{keys.place}: {key} is {section}: transformers and DeepSeek's own code differ with one of mscale and "
                "mscale_all_dim; expected both"
            )
        options = {name: value for name, value in options.items() if name not in LATENT_OPTIONS}
    ours = {known[name]: value for name, value in options.items() if value is not None}
    return {"type": kind, **ours}


def _known(kind: str, is_latent: bool) -> dict[str, str]:
    """The options of a type, and ours."""
    return {**OPTIONS[kind], **(LATENT_OPTIONS if is_latent and kind == "yarn" else {})}
