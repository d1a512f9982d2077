"""Typed, frozen configuration with errors that name file, line and key."""

from moeport.config.load import config_from_dict, load_config
from moeport.config.output import json_schema, resolved_yaml
from moeport.config.rules import check_rules
from moeport.config.schema import Config

__all__ = ["Config", "check_rules", "config_from_dict", "json_schema", "load_config", "resolved_yaml"]
