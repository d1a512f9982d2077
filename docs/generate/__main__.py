"""Write every generated piece of the repository: `make generate`, or `python docs/generate`.

`--check` writes nothing and exits with 1 where a piece is stale.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import ascend
import commands
import configuration
import exchanges
import fused
import metrics
import moe_options
import resume
import routers
from regions import filled

ROOT = Path(__file__).parents[2]
PIECES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"routers": routers.sentence},
    "docs/ascend.md": {
        "versions": ascend.versions,
        "determinism": ascend.determinism,
        "launch": ascend.launch,
        "variables": ascend.variables,
    },
    "docs/backends.md": {
        "torch cpu": fused.torch_cpu,
        "torch cuda": fused.torch_cuda,
        "torch-npu": fused.torch_npu,
        "mindspore npu": fused.mindspore_npu,
    },
    "docs/commands.md": {"commands": commands.reference},
    "docs/communication.md": {"exchanges": exchanges.overview},
    "docs/configuration.md": {"keys": configuration.keys},
    "docs/routers.md": {"overview": routers.overview, "without balance loss": routers.without_balance_loss},
    "moeport/torch/options.py": {"options": moe_options.fields},
    "docs/training.md": {
        "evaluations": metrics.evaluations,
        "steps": metrics.steps,
        "derived": metrics.derived,
        "resume": resume.rules,
    },
}
"""Of each file the names of its generated regions, and what each holds."""


def main(check: bool) -> int:
    """Bring every file up to date, or say which are not; the exit code."""
    stale = []
    for name, pieces in PIECES.items():
        old = (ROOT / name).read_text(encoding="utf-8")
        new = filled(old, pieces)
        if new != old:
            stale.append(name)
            if not check:
                (ROOT / name).write_text(new, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'stale; run make generate' if check else 'written'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
