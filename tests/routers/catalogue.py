"""What the tests of all routers run: the configs of configs/, and the `VARIANTS` that a router's own tests list.

A test file with `VARIANTS` imports no optional package at its top.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from moeport.routers.expert_choice import ExpertsChooseConfig
from tests.routers.examples import shipped


def _variants():
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if "\nVARIANTS = [" in path.read_text():
            yield from import_module(f"tests.routers.{path.stem}").VARIANTS


VARIANTS = list(_variants())
EXAMPLES: dict[str, list[Any]] = {
    name: [*configs, *(config for config in VARIANTS if config.name == name)] for name, configs in shipped().items()
}
"""By router name."""
CONFIGS = [config for configs in EXAMPLES.values() for config in configs if not config.fixed_load]
"""Of the routers in which tokens choose experts."""
EXPERTS_CHOOSE = [
    config for configs in EXAMPLES.values() for config in configs if isinstance(config, ExpertsChooseConfig)
]
"""Of the routers in which experts choose tokens, from SEQUENCES sequences."""
