"""What of Ascend is installed on this machine, read from files and metadata: no framework is imported.

Everything here returns None, or something empty, where nothing is found, and never raises: a diagnosis has to work
where nothing else does.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from moeport.ascend.table import CANN_FOLDERS, CANN_HOMES, CANN_VERSION_FILES, VARIABLES
from moeport.processes import ending_of

ROOT = Path("/")
ASCEND = Path("usr/local/Ascend")
"""Where the driver is installed, unless `/etc/ascend_install.info` names another folder."""
INSTALL_INFO = Path("etc/ascend_install.info")
SECONDS = 20.0
"""How long npu-smi may take."""
LONGEST = 2**16
"""The most bytes that are read of a file of versions."""
_VERSION = re.compile(r"(?im)^\s*version\s*=\s*\[?([^\s\]]+)")
_RUNNING = re.compile(r"(?m)^\s*\w+_version\s*=\s*\[[^]:]*:([^]\s]+)")
_CHIP = re.compile(r"(?m)^\|\s*\d+\s+([\w.-]+)\s*\|\s*([A-Za-z]+)\s*\|")
_SMI = re.compile(r"Version:\s*(\S+)")


@dataclass(frozen=True)
class Cann:
    """An installation of CANN."""

    folder: str
    version: str | None
    named_by: str | None
    """The variable that names the folder; None: it lies where it is usually installed."""
    script: str | None
    """Its `set_env.sh`."""

    @property
    def release(self) -> str | None:
        """The first two numbers of the version: 8.3 for 8.3.RC1."""
        return ".".join(self.version.split(".")[:2]) if self.version else None


@dataclass(frozen=True)
class Smi:
    """What npu-smi says."""

    path: str
    version: str | None = None
    chips: tuple[tuple[str, str], ...] = ()
    """Product name and health of each NPU."""
    problem: str | None = None


@dataclass(frozen=True)
class Package:
    """An installed Python package."""

    version: str
    requires: tuple[str, ...] = ()
    """Its requirements, as its metadata has them."""


@dataclass(frozen=True)
class Machine:
    """Everything that is found."""

    cann: tuple[Cann, ...]
    """The one that the environment names comes first."""
    driver: str | None
    firmware: str | None
    smi: Smi | None
    devices: tuple[str, ...]
    """Names of the device files of NPUs."""
    packages: Mapping[str, Package]
    """torch, torch-npu and mindspore, if installed."""
    torch_cuda: str | None
    """Version of CUDA that the build of PyTorch is for."""
    environment: Mapping[str, str]
    """Those of the variables of `moeport.ascend.table` that are set, and LD_LIBRARY_PATH."""

    @property
    def set_env(self) -> str | None:
        """The `set_env.sh` of the first CANN that has one."""
        return next((cann.script for cann in self.cann if cann.script), None)

    @property
    def is_ascend(self) -> bool:
        """Whether anything says that this machine has, or is meant to have, NPUs."""
        return bool(self.cann or self.driver or self.smi or self.devices or "torch-npu" in self.packages)

    def as_json(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        versions = {name: found.version for name, found in self.packages.items()}
        whole: dict[str, Any] = json.loads(json.dumps(asdict(self) | {"packages": versions}))
        return whole


def machine(environment: Mapping[str, str] = os.environ, root: Path = ROOT) -> Machine:
    """Look at this machine.

    Args:
        environment: variables of a process.
        root: folder in which the system's files are.
    """
    interesting = (*VARIABLES, *CANN_HOMES, "LD_LIBRARY_PATH")
    return Machine(
        cann=tuple(find_cann(environment, root)),
        driver=_version_in(_ascend(root) / "driver/version.info"),
        firmware=_version_in(_ascend(root) / "firmware/version.info"),
        smi=npu_smi(environment, root),
        devices=npus(root / "dev"),
        packages={name: found for name in ("torch", "torch-npu", "mindspore") if (found := package(name))},
        torch_cuda=torch_cuda(),
        environment={name: environment[name] for name in dict.fromkeys(interesting) if name in environment},
    )


def npus(folder: Path = ROOT / "dev") -> tuple[str, ...]:
    """Names of the device files of the NPUs that the system lists."""
    return tuple(sorted(file.name for file in folder.glob("davinci[0-9]*")))


def find_cann(environment: Mapping[str, str] = os.environ, root: Path = ROOT) -> Iterator[Cann]:
    """Installations of CANN: first the one that the environment names, if it is there, then the usual folders."""
    home = environment.get("HOME", "")
    usual: list[tuple[str | None, str]] = [(None, folder.replace("~", home, 1)) for folder in CANN_FOLDERS]
    named: list[tuple[str | None, str]] = [(name, environment[name]) for name in CANN_HOMES if environment.get(name)]
    seen = set()
    for variable, name in named + usual:
        folder = root / name.lstrip("/")
        if not name.startswith("/") or not os.path.isdir(folder) or folder.resolve() in seen:
            continue
        seen.add(folder.resolve())
        scripts = (folder / "set_env.sh", folder.parent / "set_env.sh")
        script = next((f"/{path.relative_to(root)}" for path in scripts if os.path.isfile(path)), None)
        yield Cann(name, cann_version(folder), variable, script)


def cann_version(folder: Path) -> str | None:
    """The version of the CANN in a folder."""
    files = (file for pattern in CANN_VERSION_FILES for file in sorted(folder.glob(pattern)))
    return next((found for file in files if (found := _version_in(file))), None)


def versions(*packages: str) -> dict[str, str]:
    """For the records of a run: the versions of these packages, as their modules are called, and of CANN, if known."""
    found = {name.replace("-", "_"): package(name) for name in packages}
    known = {name: each.version for name, each in found.items() if each}
    cann = current_cann()
    return known | ({"CANN": cann} if cann else {})


@cache
def current_cann() -> str | None:
    """The version of the CANN that the environment names, for the records of a run; it is looked up once."""
    return next((cann.version for cann in find_cann() if cann.named_by), None)


def npu_smi(environment: Mapping[str, str] = os.environ, root: Path = ROOT) -> Smi | None:
    """What `npu-smi info` says; None where there is no npu-smi."""
    path = shutil.which("npu-smi", path=environment.get("PATH")) or _usual_smi(root)
    if path is None:
        return None
    try:
        done = subprocess.run([path, "info"], capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Smi(path, problem=f"does not answer within {SECONDS:g} s")
    except OSError as error:
        return Smi(path, problem=str(error))
    version = _SMI.search(done.stdout)
    chips = tuple((name, health) for name, health in _CHIP.findall(done.stdout))
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()
    problem = f"{ending_of(done.returncode)}: {said[0] if said else 'says nothing'}" if done.returncode else None
    return Smi(path, version[1] if version else None, chips, problem)


def package(name: str) -> Package | None:
    """An installed package, by its metadata."""
    try:
        found = metadata.distribution(name)
        return Package(found.version, tuple(found.requires or ()))
    except (metadata.PackageNotFoundError, KeyError, OSError):
        return None


def torch_cuda() -> str | None:
    """The version of CUDA for which the installed PyTorch is built; None: without CUDA, or there is no PyTorch."""
    try:
        spec = PathFinder.find_spec("torch")
        if spec is None or spec.origin is None:
            return None
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    found = re.search(r"(?m)^cuda\s*(?::[^=]+)?=\s*['\"]([\d.]+)['\"]", text)
    return found[1] if found else None


def _usual_smi(root: Path) -> str | None:
    places = (root / place / "npu-smi" for place in ("usr/local/sbin", "usr/local/bin"))
    return next((str(place) for place in places if os.access(place, os.X_OK)), None)


def _ascend(root: Path) -> Path:
    """Where the driver and the firmware are installed."""
    named = re.search(r"(?m)^\s*Driver_Install_Path_Param\s*=\s*/?(.+?)\s*$", _text(root / INSTALL_INFO))
    return root / (named[1] if named else ASCEND)


def _version_in(file: Path) -> str | None:
    """The version that a file of versions names."""
    text = _text(file)
    found = (_RUNNING if file.suffix == ".cfg" else _VERSION).search(text)
    return found[1] if found else None


def _text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(LONGEST).decode(errors="replace")
    except OSError:
        return ""
