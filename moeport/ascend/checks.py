"""What is wrong, or looks wrong, with the environment of an Ascend machine, and how to mend it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moeport.ascend.installed import Machine
from moeport.ascend.table import CANN_HOMES, VARIABLES, install_torch, known_cann

Severity = Literal["wrong", "doubtful"]
"""wrong: something will fail, or is not in effect. doubtful: it may be meant, and is worth a look."""


@dataclass(frozen=True)
class Finding:
    """One thing that does not fit."""

    severity: Severity
    subject: str
    """What it is about: a variable, a package, the driver."""
    problem: str
    mend: str
    """How to mend it, as a command where there is one."""

    def __str__(self) -> str:
        return f"{self.subject}: {self.problem}; {self.mend}"


def findings(machine: Machine) -> list[Finding]:
    """Everything that does not fit, what is wrong first."""
    checks = (_devices, _cann, _sourced, _torch_npu, _pairs, _needs_framework)
    found = [finding for check in checks for finding in check(machine)]
    found += [*_values(machine.environment), *_contradictions(machine.environment), *_visible(machine)]
    return sorted(found, key=lambda finding: finding.severity == "doubtful")


def pin_of(machine: Machine) -> str | None:
    """The version of PyTorch that the installed torch-npu asks for, such as 2.13.0.*; None: it asks for none."""
    npu = machine.packages.get("torch-npu")
    pins = (re.fullmatch(r"torch\s*\(?==\s*([\w.+*]+)\)?", wanted) for wanted in (npu.requires if npu else ()))
    return next((pin[1] for pin in pins if pin), None)


def fits(version: str, pin: str) -> bool:
    """Whether a version is one that `==pin` means; a build such as +cpu counts only where the pin names one."""
    version = version if "+" in pin else version.partition("+")[0]
    if pin.endswith(".*"):
        return (version + ".").startswith(pin[:-1])
    return version == pin


def torch_command(machine: Machine) -> str:
    """The command that installs the PyTorch that goes with the installed torch-npu."""
    npu = machine.packages["torch-npu"]
    version = (pin_of(machine) or npu.version).partition("+")[0].removesuffix(".*").partition(".post")[0]
    return install_torch(version, platform.machine())


def _devices(machine: Machine) -> Iterator[Finding]:
    if not machine.devices and (machine.driver or machine.cann):
        yield Finding(
            "wrong",
            "NPUs",
            "the system lists none: there is no /dev/davinci0",
            "install the driver and the firmware; in a container, pass --device /dev/davinci0 and the like",
        )
    if machine.devices and not machine.driver:
        yield Finding(
            "doubtful",
            "driver",
            "its version.info is not found",
            "install the driver; in a container, mount /usr/local/Ascend/driver and /etc/ascend_install.info",
        )
    smi = machine.smi
    if smi and smi.problem:
        yield Finding("wrong", "npu-smi", smi.problem, "compare the versions of driver and firmware, and see dmesg")
    for number, (name, health) in enumerate(smi.chips if smi else ()):
        if health != "OK":
            yield Finding("wrong", f"NPU {number} ({name})", f"its health is {health}", "see npu-smi info -t health")


def _cann(machine: Machine) -> Iterator[Finding]:
    npu = machine.packages.get("torch-npu")
    user = f"torch-npu {npu.version}" if npu else "an NPU"
    if not machine.cann and (npu or machine.devices):
        yield Finding(
            "wrong",
            "CANN",
            f"none is found, and {user} needs it",
            "install the toolkit and the kernels of CANN, and source its set_env.sh in every shell that trains",
        )
    for cann in machine.cann[:1]:
        if cann.version is None:
            yield Finding(
                "doubtful", "CANN", f"no file in {cann.folder} names its version", "install CANN again, as a whole"
            )


def _sourced(machine: Machine) -> Iterator[Finding]:
    """Whether `set_env.sh` of the CANN that is there has been sourced, once."""
    set_ = {name: machine.environment[name] for name in CANN_HOMES if machine.environment.get(name)}
    for name, folder in set_.items():
        if not os.path.isdir(folder) and folder not in [cann.folder for cann in machine.cann]:
            yield Finding("wrong", name, f"there is no folder {folder}", f"unset {name} and {_source(machine)}")
    if len({os.path.realpath(folder) for folder in set_.values()}) > 1:
        words = " and ".join(f"{name} is {folder}" for name, folder in set_.items())
        yield Finding(
            "doubtful", "CANN", f"two are set: {words}", f"start a new shell and {_source(machine)}, the one you want"
        )
    if not machine.cann:
        return
    if not set_:
        yield Finding(
            "wrong", "CANN", f"{machine.cann[0].folder} is there, but ASCEND_HOME_PATH is not set", _source(machine)
        )
    elif not _on_library_path(machine):
        yield Finding("wrong", "LD_LIBRARY_PATH", f"no folder of {machine.cann[0].folder} is in it", _source(machine))


def _on_library_path(machine: Machine) -> bool:
    """Whether a folder of the first CANN is among those in which libraries are searched, by its name or its place."""
    own = Path(machine.cann[0].folder)
    folders = [Path(folder) for folder in machine.environment.get("LD_LIBRARY_PATH", "").split(":") if folder]
    return any(folder.is_relative_to(own) or folder.resolve().is_relative_to(own.resolve()) for folder in folders)


def _source(machine: Machine) -> str:
    return f"source {machine.set_env or 'the set_env.sh of CANN'}"


def _torch_npu(machine: Machine) -> Iterator[Finding]:
    npu, torch = machine.packages.get("torch-npu"), machine.packages.get("torch")
    if npu is None:
        return
    pin = pin_of(machine)
    if torch is None:
        yield Finding("wrong", "torch", f"it is missing, and torch-npu {npu.version} needs it", torch_command(machine))
        return
    if pin and not fits(torch.version, pin):
        yield Finding(
            "wrong",
            "torch",
            f"torch-npu {npu.version} is for torch {pin}, and this is {torch.version}",
            torch_command(machine),
        )
    if machine.torch_cuda:
        yield Finding(
            "wrong",
            "torch",
            f"torch {torch.version} is a build for CUDA {machine.torch_cuda}, beside which torch-npu ends the process "
            "(SIGABRT)",
            torch_command(machine),
        )
    if machine.environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD") == "0":
        yield Finding(
            "doubtful",
            "TORCH_DEVICE_BACKEND_AUTOLOAD",
            "it is 0, so PyTorch does not load torch-npu and sees no NPU",
            "unset it to use NPUs",
        )


def _pairs(machine: Machine) -> Iterator[Finding]:
    """Versions of a framework and CANN that are not known to go together."""
    cann = machine.cann[0] if machine.cann else None
    for name in ("torch-npu", "mindspore"):
        installed = machine.packages.get(name)
        pair = known_cann(name, installed.version) if installed else None
        if installed is None or cann is None or cann.release is None:
            continue
        if pair is None:
            yield Finding(
                "doubtful",
                name,
                f"it is not known which CANN goes with {name} {installed.version}; this one is {cann.version}",
                "look it up in the table of versions in its documentation",
            )
        elif cann.release not in pair.cann:
            yield Finding(
                "doubtful",
                name,
                f"{name} {installed.version} is known to work with CANN {', '.join(pair.cann)} ({pair.source}), and "
                f"this is {cann.version}",
                "install one of these",
            )


def _needs_framework(machine: Machine) -> Iterator[Finding]:
    if machine.devices and not {"torch-npu", "mindspore"} & machine.packages.keys():
        yield Finding(
            "wrong",
            "frameworks",
            "neither torch-npu nor mindspore is installed, so nothing can use the NPUs",
            "install PyTorch without CUDA and then pip install 'moeport[npu]', or pip install 'moeport[mindspore]'; "
            "see docs/ascend.md",
        )


def _values(environment: Mapping[str, str]) -> Iterator[Finding]:
    for name, variable in VARIABLES.items():
        value = environment.get(name)
        if value is not None and not re.fullmatch(variable.pattern, value):
            yield Finding("wrong", name, f"expected {variable.expected} (got {value!r})", "correct it, or unset it")


def _contradictions(environment: Mapping[str, str]) -> Iterator[Finding]:
    allocator = {name: environment.get(name) for name in ("PYTORCH_NPU_ALLOC_CONF", "PYTORCH_ALLOC_CONF")}
    if all(allocator.values()):
        yield Finding(
            "wrong", " and ".join(allocator), "both are set, which torch-npu refuses", "unset PYTORCH_ALLOC_CONF"
        )
    for name, text in allocator.items():
        options = dict(part.strip().partition(":")[::2] for part in (text or "").split(","))
        others = [other for other in ("max_split_size_mb", "garbage_collection_threshold") if other in options]
        if options.get("expandable_segments", "").lower() == "true" and others:
            yield Finding(
                "wrong", name, f"expandable_segments excludes {' and '.join(others)}", "leave out one of the two"
            )
    if environment.get("ASCEND_LAUNCH_BLOCKING") == "1":
        queue = environment.get("TASK_QUEUE_ENABLE", "0") != "0"
        also = ", and TASK_QUEUE_ENABLE has no effect" if queue else ""
        yield Finding(
            "doubtful", "ASCEND_LAUNCH_BLOCKING", f"operators run one at a time{also}", "unset it except to find errors"
        )
    if environment.get("HCCL_IF_IP") and environment.get("HCCL_SOCKET_IFNAME"):
        yield Finding(
            "doubtful", "HCCL_SOCKET_IFNAME", "it has no effect, since HCCL_IF_IP is set too", "unset one of the two"
        )
    if environment.get("HCCL_DETERMINISTIC", "true").lower() == "false":
        yield Finding(
            "doubtful",
            "HCCL_DETERMINISTIC",
            "it is false, so two runs may differ even with backend.deterministic: true, the default",
            "unset it, and moeport sets it",
        )
    yield from _timeouts(environment)


def _timeouts(environment: Mapping[str, str]) -> Iterator[Finding]:
    texts = {
        name: environment.get(name, VARIABLES[name].default) for name in ("HCCL_EVENT_TIMEOUT", "HCCL_EXEC_TIMEOUT")
    }
    if not texts.keys() & environment.keys() or not all(text.isdecimal() for text in texts.values()):
        return
    event, execution = map(int, texts.values())
    limit = f"{execution} s" if execution else "no limit"
    if event and (event <= execution or not execution):
        yield Finding(
            "doubtful",
            "HCCL_EVENT_TIMEOUT",
            f"{event} s is not more than HCCL_EXEC_TIMEOUT ({limit}), so a slow collective is "
            "reported as a stuck device",
            f"export HCCL_EVENT_TIMEOUT={execution + 32 if execution else 0}",
        )


def _visible(machine: Machine) -> Iterator[Finding]:
    """Numbers of NPUs that are not there."""
    name = "ASCEND_RT_VISIBLE_DEVICES"
    chosen = machine.environment.get(name, "")
    if not re.fullmatch(VARIABLES[name].pattern, chosen):
        return
    numbers = [int(number) for number in chosen.split(",")]
    missing = sorted({number for number in numbers if number >= len(machine.devices)}) if machine.devices else []
    if missing:
        words = ", ".join(map(str, missing))
        yield Finding("wrong", name, f"there is no NPU {words}: the system lists {len(machine.devices)}", "correct it")
    if len(numbers) > len(set(numbers)):
        yield Finding("wrong", name, f"a number is given twice ({chosen})", "correct it")
