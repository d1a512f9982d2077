"""moeport: train mixture-of-experts language models from one config.

Everything the command line does is a call here; importing the package imports no framework.

    import moeport
    config = moeport.load_config("configs/quickstart.yaml", ["training.steps=200", "run.dir=runs/short"])
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
    from moeport.convert.evaluation import evaluate, evaluate_tasks
    from moeport.convert.from_hf import from_hf
    from moeport.convert.to_hf import to_hf
    from moeport.convert.upcycle import upcycle
    from moeport.training.generate import generate
    from moeport.training.report import write_report
    from moeport.training.run import train

__version__ = VERSION

_PLACES = {
    "Config": "moeport.config:Config",
    "config_from_dict": "moeport.config:config_from_dict",
    "doctor": "moeport.backends.doctor:report",
    "evaluate": "moeport.convert.evaluation:evaluate",
    "evaluate_tasks": "moeport.convert.evaluation:evaluate_tasks",
    "from_hf": "moeport.convert.from_hf:from_hf",
    "generate": "moeport.training.generate:generate",
    "json_schema": "moeport.config:json_schema",
    "load_config": "moeport.config:load_config",
    "resolved_yaml": "moeport.config:resolved_yaml",
    "to_hf": "moeport.convert.to_hf:to_hf",
    "train": "moeport.training.run:train",
    "upcycle": "moeport.convert.upcycle:upcycle",
    "write_report": "moeport.training.report:write_report",
}
"""Public name to module and name in it; imported on first use, so that `import moeport` stays fast."""

__all__ = [
    "Config",
    "__version__",
    "config_from_dict",
    "doctor",
    "evaluate",
    "evaluate_tasks",
    "from_hf",
    "generate",
    "json_schema",
    "load_config",
    "resolved_yaml",
    "to_hf",
    "train",
    "upcycle",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(module), attribute)
