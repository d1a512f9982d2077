"""Typed, frozen configuration with errors that name file, line and key."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeport.config.load import config_from_dict, load_config
    from moeport.config.output import json_schema, resolved_yaml
    from moeport.config.rules import check_rules
    from moeport.config.schema import Config

__all__ = ["Config", "check_rules", "config_from_dict", "json_schema", "load_config", "resolved_yaml"]

_MODULES = {
    "Config": "schema",
    "check_rules": "rules",
    "config_from_dict": "load",
    "json_schema": "output",
    "load_config": "load",
    "resolved_yaml": "output",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: the schema imports the routers, whose configs import this package.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
