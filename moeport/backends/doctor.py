"""What this machine can do with moeport: backends, devices, compute types, kernels, and what is missing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moeport.ascend import report as ascend
from moeport.ascend.trouble import AUTOLOAD, EXTENSION, explained
from moeport.config.trackers import TRACKERS
from moeport.data.cache import cache_dir
from moeport.errors import WriteError
from moeport.facts import BACKENDS
from moeport.files import check_folder
from moeport.launch.machine import accelerators_seen, load, memory_bytes, processor
from moeport.launch.network import network
from moeport.processes import ending_of, last_line, python_path, usable_cores
from moeport.version import VERSION, commit, described

TIME_LIMIT = 300
"""Seconds that one examination may take."""


@dataclass(frozen=True)
class Package:
    """A package that moeport uses."""

    purpose: str
    module: str
    """Module that is imported to try it."""
    install: str | None = None
    """The command that installs it."""
    note: str | None = None
    backend: str | None = None
    """The backend that uses it."""
    extensions: tuple[str, ...] = ()
    """Packages that are loaded with it, where they are installed."""


FRAMEWORKS = {
    **{
        name: Package(facts.purpose, facts.framework, facts.install, backend=name, extensions=facts.extensions)
        for name, facts in BACKENDS.items()
    },
    "torch_npu": Package(
        "PyTorch on Ascend", "torch_npu", "pip install 'moeport[npu]'", "not run on hardware", extensions=(EXTENSION,)
    ),
}
OPTIONAL = {
    "datasets": Package("data.source.name: huggingface", "datasets", "pip install 'moeport[data]'"),
    "zstandard": Package("data in .zst files", "zstandard", "pip install 'moeport[data]'"),
    "scikit-learn": Package("data.source.name: digits", "sklearn", "pip install 'moeport[vision]'"),
    "matplotlib": Package("--plot", "matplotlib", "pip install 'moeport[plot]'"),
    "tensorboard": Package(
        "metrics.tensorboard", "tensorboard.summary.writer.event_file_writer", "pip install 'moeport[tensorboard]'"
    ),
    **{
        name: Package("metrics.trackers", facts.package, facts.install)
        for name, facts in TRACKERS.items()
        if name != "tensorboard"
    },
    "lm_eval": Package("moeport eval --tasks", "lm_eval", "pip install 'moeport[eval]'"),
}


def report() -> dict[str, Any]:
    """Examine everything; takes seconds and never raises.

    Returns: JSON-able values. In `backends` and `packages` each entry has `installed`, `version`, `problem` (None if
    there is none), `install` (the command, if it is missing or broken) and `note`. A usable backend also has `trains`,
    `divides` (what ranks divide), `threads`, the libraries of `communication`, the `private_names` that it
    uses of its framework and, per device, the units with their memory in bytes, and per compute type whether a tiny
    model ran in it, the speed of a matrix product and the kernels; `timed` is what was chosen by time, by case, and
    None where nothing is. Where an installed torch-npu keeps PyTorch from starting, these are as found `without_npus`.
    `cpu`, `accelerators_seen`, `network` and `storage` describe the machine; `ascend` is
    `moeport.ascend.installed.Machine`, with what does not fit in `findings`. `commit` is moeport's; None if unknown.
    """
    return {
        "moeport": VERSION,
        "commit": commit(),
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "platform": platform.platform(),
        "cpu": {
            "model": processor().model,
            "bfloat16_units": processor().bfloat16,
            "cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "load": load(),
            "memory_bytes": memory_bytes(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
            "settings": _settings(),
        },
        "accelerators_seen": accelerators_seen(),
        "backends": {name: describe(package) for name, package in FRAMEWORKS.items()},
        "packages": _packages(),
        "ascend": ascend.report(),
        "network": network(),
        "storage": _storage(),
    }


def _packages() -> dict[str, dict[str, Any]]:
    """The entries of the optional packages, which are tried at the same time."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(OPTIONAL, pool.map(describe, OPTIONAL.values()), strict=True))


def describe(package: Package) -> dict[str, Any]:
    """The entry of a package in the report: whether it is installed and works."""
    spec = PathFinder.find_spec(package.module.partition(".")[0])
    installed = spec is not None and spec.origin is not None
    found: dict[str, Any] = {"installed": installed, "version": None, "problem": None}
    if installed:
        found |= _examine(package, os.environ)
    said = found.pop("said", found["problem"])
    missing = not installed or found["problem"] is not None
    found |= {"install": package.install if missing else None, "note": package.note}
    trouble = explained(f"{package.module}: {said}") if said and EXTENSION in package.extensions else None
    if trouble:
        found |= {"problem": trouble.problem, "install": None, "note": trouble.mend}
        found |= _without_npus(package) if package.backend else {}
    return {"purpose": package.purpose, **found}


def _without_npus(package: Package) -> dict[str, Any]:
    """What PyTorch can do here if it does not load torch-npu."""
    found = _examine(package, os.environ | {AUTOLOAD: "0"})
    found.pop("said", None)
    usable = {} if found.pop("problem") else found
    return {**usable, "without_npus": bool(usable)}


def _examine(package: Package, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run `moeport.backends.examine` in a process that may die or hang.

    Returns: its findings; `problem` alone, and in `said` all that the process said, if it has none.
    """
    backend = [package.backend] if package.backend else []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "moeport.backends.examine", package.module, str(file), *backend],
                env={**environment, "PYTHONPATH": python_path()},
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIME_LIMIT,
            )
            if file.is_file():
                found: dict[str, Any] = json.loads(file.read_text())
                return found
        except subprocess.TimeoutExpired:
            return {"problem": f"does not answer within {TIME_LIMIT} s"}
        except (OSError, ValueError) as error:
            return {"problem": f"cannot be tried: {error}"}
    ending, last = ending_of(done.returncode), last_line(done.stderr)
    problem = f"ends the process that imports it, {ending}: {last}".rstrip(": ")
    return {"problem": problem, "said": f"{problem}\n{done.stderr}"}


def _storage() -> dict[str, Any]:
    """Where prepared data is kept unless a config says otherwise, and how much room is left."""
    folder = cache_dir(None)
    place = next(path for path in (folder, *folder.parents) if path.is_dir())
    return {
        "cache": str(folder),
        "cache_problem": _problem_of(folder),
        "cache_free_bytes": shutil.disk_usage(place).free,
        "here_free_bytes": shutil.disk_usage(Path.cwd()).free,
    }


def _problem_of(folder: Path) -> str | None:
    """Why files cannot be written to a folder; None if they can."""
    try:
        check_folder(folder)
    except WriteError as error:
        return str(error)
    return None


def _settings() -> dict[str, str]:
    """Environment variables that decide how many threads there are and how they wait."""
    return {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "MKL_", "KMP_", "GOMP_"))}


def _training(backend: Mapping[str, Any]) -> str:
    """Whether a backend trains, and what ranks divide that would otherwise hold copies."""
    if not backend["trains"]:
        return "forward only: evaluates, does not train"
    return f"trains; ranks divide {', '.join(backend['divides'])}" if backend["divides"] else "trains"


def render(found: Mapping[str, Any]) -> RenderableType:
    """Format a report for a terminal."""
    parts: list[RenderableType] = [
        Text(f"moeport {found['moeport']} ({described(found['commit'])})", style="bold"),
        Text(f"Python {found['python']['version']} ({found['python']['executable']}), {found['platform']}"),
        *map(Text, _machine(found)),
    ]
    for name, backend in found["backends"].items():
        parts += [Text(), _heading(name, backend)]
        if backend.get("without_npus"):
            parts.append(_indented(Text(f"with {AUTOLOAD}=0, so without NPUs:")))
        if "trains" in backend:
            parts.append(_indented(Text(_training(backend))))
            parts += [_indented(Text(line)) for line in _threads_and_communication(backend)]
        for device in backend.get("devices", {}).values():
            parts.append(_indented(_device(device)))
    parts += [Text(), Text("Optional packages", style="bold")]
    parts += [_indented(_heading(name, package)) for name, package in found["packages"].items()]
    if about_npus := list(ascend.lines(found["ascend"])):
        parts += [Text(), *about_npus]
    parts += [Text(), Text("Network", style="bold"), *(_indented(Text(line)) for line in _network(found["network"]))]
    return Group(*parts)


def _machine(found: Mapping[str, Any]) -> Iterator[str]:
    """Lines on processor, memory, accelerators and disk."""
    cpu, storage = found["cpu"], found["storage"]
    units = {True: "with bfloat16 units", False: "without bfloat16 units", None: "not known to have bfloat16 units"}
    busy = "" if cpu["load"] is None else f", load {cpu['load']:g}"
    yield f"{cpu['model']}, {units[cpu['bfloat16_units']]}"
    yield f"{cpu['usable_cores']} of {cpu['cores']} cores{busy}, {_gibibytes(cpu['memory_bytes'])} memory"
    if cpu["settings"]:
        yield "set: " + ", ".join(f"{name}={value}" for name, value in sorted(cpu["settings"].items()))
    yield "accelerators that the system lists: " + (", ".join(found["accelerators_seen"]) or "none")
    yield f"cache {storage['cache']}, {_gibibytes(storage['cache_free_bytes'])} free" + (
        f": {storage['cache_problem']}" if storage["cache_problem"] else ""
    )
    yield f"current folder: {_gibibytes(storage['here_free_bytes'])} free"


def _threads_and_communication(backend: Mapping[str, Any]) -> Iterator[str]:
    """Lines on a usable backend."""
    if backend.get("threads"):
        yield f"threads: {backend['threads']}"
    if libraries := backend.get("communication"):
        words = (f"{name} {version or 'missing'}" for name, version in libraries.items())
        yield f"communication: {', '.join(words)}"
    if names := backend.get("private_names"):
        yield f"names of the framework that are not public: {len(names)} are used, and all were found"


def _network(found: Mapping[str, Any]) -> Iterator[str]:
    """Lines on interfaces, launchers and emulation."""
    for each in found["interfaces"]:
        speed = f", {each['mbit_per_second']:,} Mbit/s" if each["mbit_per_second"] else ""
        yield f"{each['name']}: {each['address'] or 'no IPv4 address'}{speed}{'' if each['up'] else ', down'}"
    for name, value in found["chosen"].items():
        yield f"{name}={value}"
    there = [name for name, path in found["launchers"].items() if path]
    yield f"launchers: {', '.join(there) or 'none on the path'}"
    problem = found["emulation"]["problem"]
    yield f"moeport emulate: {'works here' if problem is None else ' '.join(problem.split())}"


def _heading(name: str, entry: Mapping[str, Any]) -> Text:
    text = Text(name, style="bold")
    text.append(f" ({entry['purpose']}): ", style="not bold")
    if not entry["installed"]:
        text.append("not installed", style="not bold yellow")
    elif entry["problem"]:
        text.append("; ".join(filter(None, (entry["version"], entry["problem"]))), style="not bold red")
    else:
        text.append(entry["version"] or "installed", style="not bold green")
    for remark in (entry["note"], entry["install"] and f"install it with: {entry['install']}"):
        if remark:
            text.append(f"; {remark}", style="not bold")
    return text


def _device(device: Mapping[str, Any]) -> RenderableType:
    parts: list[RenderableType] = [Text(device["description"], style="bold")]
    parts += [Text(f"{unit['name']}, {_gibibytes(unit['memory_bytes'])}") for unit in device["units"]]
    table = Table(box=None, padding=(0, 3, 0, 0), show_header=False)
    for dtype, result in device["dtypes"].items():
        if result["usable"]:
            speed = f"{result['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s in a matrix product"
            table.add_row(dtype, Text("usable", style="green"), speed)
        else:
            table.add_row(dtype, Text("not usable", style="yellow"), Text(result["problem"].partition("\n")[0]))
    parts.append(table)
    ratio = device["bfloat16_over_float32"]
    if ratio is not None:
        parts.append(Text(f"bfloat16 runs at {ratio:.2f} times the speed of float32"))
    return Group(*parts, *(_kernels(device["dtypes"])), *map(Text, _timed(device["timed"])))


def _kernels(dtypes: Mapping[str, Any]) -> Iterator[Table]:
    """Kernels grouped by implementation; one table for all compute types with the same kernels."""
    groups: dict[str, list[str]] = {}
    for dtype, result in dtypes.items():
        if result["usable"]:
            groups.setdefault(json.dumps(result["kernels"]), []).append(dtype)
    for kernels, names in groups.items():
        table = Table(box=None, padding=(0, 3, 0, 0), show_header=False, title_justify="left", title_style="")
        table.title = f"kernels in {', '.join(names)}"
        by_implementation: dict[str, list[str]] = {}
        for kernel, implementation in json.loads(kernels).items():
            by_implementation.setdefault(implementation, []).append(kernel)
        for implementation, members in by_implementation.items():
            table.add_row(Text(", ".join(members)), Text(implementation))
        yield table


def _timed(timed: Mapping[str, str] | None) -> Iterator[str]:
    """Lines on the kernels that were chosen by time."""
    if timed is not None:
        yield "fastest forms, as timed on this machine" + (":" if timed else ": none has been timed yet")
        for case, found in timed.items():
            yield f"  {case}: {found}"


def _indented(content: RenderableType) -> Padding:
    return Padding(content, (0, 0, 0, 2))


def _gibibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
