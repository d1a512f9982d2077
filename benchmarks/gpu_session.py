"""All measurements for one GPU, in one command of less than 8 minutes that downloads nothing.

    python benchmarks/gpu_session.py OUT [--minutes 7.5] [--wheels FOLDER]
    python benchmarks/gpu_session.py OUT --device cpu --tiny

Runs, one after another, each in processes of its own and within its share of the time: the tests of kernels that need a
GPU; the trials of fused kernels; the benchmark of one layer on four shapes with even and with Zipf loads; the benchmark
of the step of an 844 M model with each kernel left out in turn; the quickstart, as a step and as `moeport train`. Every
part writes its own files to OUT, and after each the verdicts on all targets are written to session.md and session.json:
what ends the session early loses only what was running. `--device cpu --tiny` runs the same on small sizes, to check
the session itself; it judges the same targets, which then mean nothing.

moeport needs its dependencies (numpy, pydantic, PyYAML, ...), but need not be installed. `--wheels` names a folder of
wheels that are unpacked first, without pip or an index: those of dependencies, and of other projects to compare with.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contest.targets import Verdict, verdicts

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
NEEDED = (
    *("jinja2", "numpy", "pydantic", "rich", "safetensors", "scipy", "tokenizers", "torch", "typer"),
    *("typing_extensions", "yaml"),
)
"""Modules without which moeport does not start."""
JUDGED = ("MISSED", "MET")
GRACE_S = 10.0
"""A part that does not end by itself is ended this long after its time."""


@dataclass(frozen=True)
class Part:
    """One part of the session."""

    name: str
    share: float
    """Of the time of all parts; what a part leaves goes to those after it."""
    commands: Sequence[Sequence[str]]
    """Run one after the other; {seconds} and {minutes} stand for what is left of the part's time."""


def parts(out: Path, device: str, tiny: bool) -> list[Part]:
    """The parts, in order of what is lost most if time runs out."""
    python, small = sys.executable, ["--tiny"] if tiny else []
    where = ["--device", device, "--minutes", "{minutes}", *small]
    layer = [python, str(BENCHMARKS / "moe_layer.py"), *where, "--zipf", "0,1", "--out", str(out / "layer")]
    layer += ["--shapes", "tiny", "--only", "moeport,plain"] if tiny else ["--only", LAYER_CONTENDERS]
    step = [python, str(BENCHMARKS / "step.py"), *where]
    quick = ["--models", "tiny" if tiny else "quickstart", "--others", "", "--out", str(out / "quickstart")]
    models = [] if tiny else ["--models", "844m"]
    run = out / "quickstart" / "run"
    train = [python, "-m", "moeport", "train", str(ROOT / "configs/quickstart.yaml"), "--set", f"run.dir={run}"]
    train += ["--set", f"backend.device={device}", "--set", f"training.steps={4 if tiny else 600}"]
    train += ["--set", "training.evaluation_interval=0", "--set", "checkpoint.interval=0"]
    return [
        Part("tests", 0.16, [kernel_tests(device, tiny)]),
        Part(
            "trials", 0.06, [[python, str(BENCHMARKS / "trials.py"), "--device", device, "--out", str(out / "trials")]]
        ),
        Part("layer", 0.44, [layer]),
        Part("step", 0.22, [[*step, *TIMED, "--ablate", "--out", str(out / "step"), *models]]),
        Part("quickstart", 0.12, [[*step, *quick], train]),
    ]


TIMED = ("--variant", "forms chosen by time:backend.deterministic=false")
"""The step with whichever form of each kernel is fastest; with equal bits from run to run fewer compete."""

LAYER_CONTENDERS = "=moeport,plain,Mixtral grouped_mm,SonicMoE,ScatterMoE,Liger,MegaBlocks,torchtitan"
"""The fastest of each project, since every contender compiles; of moeport's kernels, those that it chooses itself."""


def kernel_tests(device: str, tiny: bool) -> list[str]:
    """The tests of kernels on a device; with `tiny`, a few that run anywhere."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=20"]
    if find_spec("xdist"):
        command += ["-n", "0" if tiny else str(min(8, os.cpu_count() or 1))]
    if tiny:
        return [*command, "tests/backends/test_trial.py", "-k", "named_must_pass or first_that_passes"]
    folders = [name for name in ("conformance", "backends", "torch_moe", "cuda") if (ROOT / "tests" / name).is_dir()]
    return [*command, "-m", device, *(f"tests/{name}" for name in folders)]


def unpack(wheels: Path, site: Path) -> int:
    """Unpack wheels, which are zip files; returns how many there were."""
    found = sorted(wheels.glob("*.whl"))
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return len(found)


def run_command(command: Sequence[str], seconds: float, log: Path) -> str:
    """Run a command for at most so long; returns how it ended. Its output goes to the log."""
    times = {"{seconds}": f"{seconds:.0f}", "{minutes}": f"{seconds / 60:.3f}"}
    filled = [times.get(text, text) for text in command]
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            filled, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds + GRACE_S)
        except BaseException as error:  # also where the session is interrupted: nothing stays behind on the device
            os.killpg(process.pid, 9)
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return "ended: out of time"
            raise
    return "done" if code == 0 else f"exit code {code}"


def run_parts(chosen: Sequence[Part], out: Path, minutes: float) -> dict[str, Any]:
    """Run the parts within the time, and write the verdicts after each."""
    began = time.monotonic()
    end = began + 60 * minutes - GRACE_S
    session: dict[str, Any] = {"parts": {}, "verdicts": []}
    for index, part in enumerate(chosen):
        left = end - time.monotonic()
        seconds = left * part.share / sum(each.share for each in chosen[index:])
        until = time.monotonic() + seconds
        ended = []
        for command in part.commands:
            rest = until - time.monotonic()
            ended.append(run_command(command, rest, out / f"{part.name}.log") if rest > 1 else "no time left")
        took = time.monotonic() - until + seconds
        session["parts"][part.name] = {
            "ended": ended,
            "seconds": round(took, 1),
            "last": tail(out / f"{part.name}.log"),
        }
        found = [*of_tests(session["parts"].get("tests")), *verdicts(out)]
        session["verdicts"] = [verdict.as_dict() for verdict in found]
        session["seconds"] = round(time.monotonic() - began, 1)
        (out / "session.json").write_text(json.dumps(session, indent=1), encoding="utf-8")
        (out / "session.md").write_text(summary(session, found), encoding="utf-8")
        print(f"{part.name}: {', '.join(ended)}, {took:.0f} s", flush=True)
    return session


def of_tests(part: dict[str, Any] | None) -> list[Verdict]:
    """The verdict on the tests of kernels."""
    if part is None:
        return []
    return [
        Verdict(
            "kernel tests",
            "all pass",
            part["last"].partition("| ")[2] or part["last"],
            JUDGED[part["ended"] == ["done"]],
        )
    ]


def tail(log: Path, lines: int = 2) -> str:
    """The last lines of a log."""
    if not log.exists():
        return ""
    said = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " | ".join(said[-lines:])[-300:]


def summary(session: dict[str, Any], found: Sequence[Verdict]) -> str:
    """Targets beside results, and how the parts ended."""
    lines = ["| Target | Wanted | Measured | |", "|---|---|--:|---|"]
    lines += [f"| {each.target} | {each.wanted} | {each.measured} | {each.word} |" for each in found]
    lines += ["", "| Part | Ended | Seconds | Its last lines |", "|---|---|--:|---|"]
    for name, part in session["parts"].items():
        last = part["last"].replace("|", "/")
        lines.append(f"| {name} | {', '.join(part['ended'])} | {part['seconds']} | {last} |")
    return "\n".join(lines) + "\n"


def main(given: list[str] | None = None) -> int:
    """Run the session; returns 1 if a target was missed or could not be judged, 2 if it cannot start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--wheels", type=Path, default=None)
    parser.add_argument("--only", default="", help="parts, by comma")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(given)
    out = options.out.resolve()
    if (out / "session.json").exists():
        print(f"{out} holds a session; expected a new folder")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT)]
    if options.wheels:
        site = out / "site"
        shutil.rmtree(site, ignore_errors=True)
        print(f"{unpack(options.wheels, site)} wheels unpacked")
        paths.append(str(site))
        sys.path.append(str(site))
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(f"not importable: {', '.join(missing)}; put their wheels into a folder and pass --wheels FOLDER")
        return 2
    known = {part.name: part for part in parts(out, options.device, options.tiny)}
    names = options.only.split(",") if options.only else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"--only: {', '.join(unknown)}: unknown; expected some of {', '.join(known)}")
        return 2
    chosen = [part for name, part in known.items() if name in names]
    session = run_parts(chosen, out, options.minutes)
    print((out / "session.md").read_text(encoding="utf-8"))
    return 0 if all(each["word"] == "MET" for each in session["verdicts"]) else 1


if __name__ == "__main__":
    sys.exit(main())
