"""Write every generated piece of the repository: `make generate`, or `python docs/generate`.

`--check` writes nothing and exits with 1 where a piece is stale.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import ascend
import commands
import configuration
import exchanges
import fused
import metrics
import model_shapes
import moe_options
import platforms
import resume
import routers
import versions
from figures import FIGURES
from figures.exchange import worked
from regions import filled

ROOT = Path(__file__).parents[2]
PIECES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"platforms": platforms.table, "routers": routers.sentence},
    "docs/all-to-all.md": {"exchanges": exchanges.overview, "worked example": worked},
    "docs/ascend.md": {
        "versions": ascend.versions,
        "determinism": ascend.determinism,
        "launch": ascend.launch,
        "variables": ascend.variables,
    },
    "docs/backends.md": {
        "platforms": platforms.table,
        "torch cpu": fused.torch_cpu,
        "torch cuda": fused.torch_cuda,
        "torch-npu": fused.torch_npu,
        "mindspore npu": fused.mindspore_npu,
    },
    "docs/commands.md": {"commands": commands.reference},
    "docs/configuration.md": {"keys": configuration.keys},
    "docs/index.md": {"platforms": platforms.table},
    "docs/routers.md": {"overview": routers.overview, "without balance loss": routers.without_balance_loss},
    "moeport/torch/options.py": {"options": moe_options.fields},
    "docs/training.md": {
        "evaluations": metrics.evaluations,
        "steps": metrics.steps,
        "derived": metrics.derived,
        "resume": resume.rules,
    },
    "examples/models/README.md": model_shapes.pieces(),
    "docs/versions.md": {"tried": versions.tried, "resolved": versions.resolved},
}
"""Of each file the names of its generated regions, and what each holds."""


def contents() -> Iterator[tuple[str, str]]:
    """What every file should hold."""
    for name, pieces in PIECES.items():
        yield name, filled((ROOT / name).read_text(encoding="utf-8"), pieces)
    for name, figure in FIGURES.items():
        yield name, figure()


def main(check: bool) -> int:
    """Bring every file up to date, or say which are not; the exit code."""
    stale = []
    for name, content in contents():
        path = ROOT / name
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            stale.append(name)
            if not check:
                path.write_text(content, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'stale; run make generate' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
