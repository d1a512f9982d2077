"""One MoE layer: moeport against other projects, a dense MLP of equal FLOPs and a large matrix product.

    python benchmarks/moe_layer.py [--device cpu] [--shapes a,b] [--zipf 0,1] [--minutes 10] [--out FOLDER]
    python benchmarks/moe_layer.py --curve tokens --shapes olmoe
    python benchmarks/moe_layer.py --device cpu --tiny

All layers of a shape have the same weights, and each is compared with a float32 reference before it is timed. They are
timed in one process, in rounds in which each has its turn. Each call has new tokens, as in training: on a CPU, products
in bfloat16 take several times as long for numbers of rows that are new. A contender that is not installed, fails or
computes something wrong is listed with the reason. On an accelerator every comparison and every shape has a process of
its own, and the process that starts them does not touch the device. `--minutes` is kept: shapes share what is left.

Writes layer.json, layer.md and layer.svg to the folder after every shape.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from contest.child import Terms
from contest.contenders import contenders, is_wanted
from contest.contest import Contest, run, serve
from contest.output import bars, curves, table
from contest.shapes import CURVES, ON_CPUS, ON_DEVICES, SHAPES, TINY, Shape, curve


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=None, help="cpu, cuda, npu; default: the accelerator that torch finds")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--shapes", default=None, help=f"by comma, of {', '.join(SHAPES)}")
    parser.add_argument("--zipf", type=exponents, default="0", help="exponents of the loads, by comma; 0: even")
    parser.add_argument(
        "--only", default="", help="texts in the names of contenders, by comma; limits always take part"
    )
    parser.add_argument("--rounds", type=positive, default=12)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--tokens", type=positive, default=None, help="instead of the shape's own number")
    parser.add_argument("--passes", default="both", choices=["both", "backward", "forward"])
    parser.add_argument("--curve", default=None, choices=list(CURVES))
    parser.add_argument("--tiny", action="store_true", help="small shapes, few rounds: checks the benchmark itself")
    parser.add_argument("--isolate", action=argparse.BooleanOptionalAction, default=None, help="processes of their own")
    parser.add_argument("--out", type=Path, default=None, help="folder for layer.json, layer.md and layer.svg")
    parser.add_argument("--job", type=Path, default=None, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def chosen_shapes(options: argparse.Namespace, device: str) -> list[Shape]:
    """The layers to time, in order."""
    default = TINY if options.tiny else ON_CPUS if device == "cpu" else ON_DEVICES
    names = options.shapes.split(",") if options.shapes else default
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise SystemExit(f"--shapes: {', '.join(unknown)}: unknown; expected some of {', '.join(SHAPES)}")
    found = [SHAPES[name] for name in names]
    if options.tokens:
        found = [replace(shape, tokens=options.tokens) for shape in found]
    if options.curve:
        found = [each for shape in found for each in curve(shape, options.curve)]
    return [replace(shape, zipf=zipf) for shape in found for zipf in options.zipf]


def exponents(text: str) -> list[float]:
    """Numbers by comma, for options."""
    return [float(each) for each in text.split(",")]


def chosen_names(text: str) -> list[str]:
    """What names of contenders are to have in them; each of them has to be in one, or this raises SystemExit."""
    found = [each for each in text.split(",") if each]
    names = [name for device in ("cpu", "cuda", "npu") for name in contenders(device)]
    strange = [each for each in found if not any(is_wanted(name, [each]) for name in names)]
    if strange:
        raise SystemExit(f"--only: {', '.join(strange)}: in no name; names are {', '.join(dict.fromkeys(names))}")
    return found


def positive(text: str) -> int:
    """A whole number of at least 1, for options."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def accelerator() -> str:
    """The type of device that torch finds, without starting it."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found else "cpu"


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Hold the contest; print and write the results."""
    options = arguments(given)
    if options.job:
        serve(json.loads(options.job.read_text(encoding="utf-8")))
        sys.stdout.flush()
        os._exit(0)  # tearing down a device takes time that belongs to the next process
    device = options.device or accelerator()
    terms = Terms(
        device,
        getattr(torch, options.dtype),
        min(options.rounds, 3) if options.tiny else options.rounds,
        backward=options.passes != "forward",
        forward=options.passes != "backward",
    )
    isolate = device != "cpu" if options.isolate is None else options.isolate
    only = chosen_names(options.only)
    contest = Contest(chosen_shapes(options, device), terms, options.minutes * 60, only, isolate)

    def write(found: dict[str, Any]) -> None:
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            drawn = curves(found, CURVES[options.curve][0]) if options.curve else bars(found)
            for name, text in (("json", json.dumps(found, indent=1)), ("md", table(found)), ("svg", drawn)):
                (options.out / f"layer.{name}").write_text(text, encoding="utf-8")

    with tempfile.TemporaryDirectory() as folder:
        found = run(contest, Path(folder), write)
    print(table(found))
    return found


if __name__ == "__main__":
    main()
