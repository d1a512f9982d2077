"""What computes each kernel on this device and why: the trials of all its fused kernels, by compute type.

python benchmarks/trials.py [--device cuda] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from moe_layer import accelerator

from moeport.backends import get_backend
from moeport.backends.torch.fused import FusedOps
from moeport.config.training import BackendConfig

DTYPES = ("bfloat16", "float32")


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Try the kernels; print and write what was chosen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=None, help="folder for trials.json and trials.md")
    options = parser.parse_args(given)
    found: dict[str, Any] = {}
    lines = ["| Kernel | Type | Chosen |", "|---|---|---|"]
    tried = ["", "| Kernel | Type | Form | Trial |", "|---|---|---|---|"]
    for dtype in DTYPES:
        started = time.perf_counter()
        backend = get_backend(BackendConfig(name="torch", device=options.device or accelerator(), dtype=dtype))
        choices = backend.kernel_choices()
        forms = backend.ops.verdicts(dtype) if isinstance(backend.ops, FusedOps) else {}
        found[dtype] = {
            "choices": choices,
            "forms": {f"{kernel}: {name}": wrong for (kernel, name), wrong in forms.items()},
            "seconds": round(time.perf_counter() - started, 2),
            "device": backend.device,
        }
        lines += [f"| {kernel} | {dtype} | {_cell(text)} |" for kernel, text in choices.items()]
        tried += [
            f"| {kernel} | {dtype} | {name} | {_cell(why or 'passes')} |" for (kernel, name), why in forms.items()
        ]
    lines += tried
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "trials.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        (options.out / "trials.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return found


def _cell(text: str) -> str:
    return text.replace("|", "/")


if __name__ == "__main__":
    main()
