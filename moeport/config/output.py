"""A config as YAML, and the schema as JSON Schema."""

from typing import Any

import yaml

from moeport.config.keys import choices
from moeport.config.schema import Config
from moeport.config.yaml_text import Dumper


def resolved_yaml(config: Config) -> str:
    """All values as YAML, which loads back to an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110)


def json_schema() -> dict[str, Any]:
    """JSON Schema of the config file, with a description of every key."""
    schema = Config.model_json_schema()
    for sections in choices().values():
        for section in sections.values():
            schema["$defs"][section.__name__].setdefault("required", []).append("name")
    bases = schema["$defs"]["AttentionConfig"]["properties"]["rope_bases"]
    listed = schema["$defs"]["RopeBasesConfig"]["properties"]["values"]
    bases["anyOf"] = [{"$ref": bases.pop("$ref")}, {"type": "array", "items": listed["items"]}, {"type": "null"}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "moeport config"}
