"""moeport: train mixture-of-experts language models on GPUs and Ascend NPUs from one config.

Everything the command line does is a call here; importing the package imports no framework.

    import moeport
    config = moeport.load_config("configs/quickstart.yaml", ["training.steps=50"])
    summary = moeport.train(config)
    print(moeport.generate(summary.run_dir, "def "))

`moeport.torch.MoE` is the layer as an nn.Module.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moeport.version import VERSION

if TYPE_CHECKING:
    from moeport.backends.doctor import report as doctor
    from moeport.config import Config, config_from_dict, json_schema, load_config, resolved_yaml
    from moeport.train.generate import generate
    from moeport.train.report import write_report
    from moeport.train.run import train

__version__ = VERSION

_PLACES = {
    "Config": "moeport.config",
    "config_from_dict": "moeport.config",
    "json_schema": "moeport.config",
    "load_config": "moeport.config",
    "resolved_yaml": "moeport.config",
    "generate": "moeport.train.generate",
    "train": "moeport.train.run",
    "write_report": "moeport.train.report",
}

__all__ = [
    "Config",
    "__version__",
    "config_from_dict",
    "doctor",
    "generate",
    "json_schema",
    "load_config",
    "resolved_yaml",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import moeport` and `moeport --help` stay fast.
    if name == "doctor":
        return import_module("moeport.backends.doctor").report
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
