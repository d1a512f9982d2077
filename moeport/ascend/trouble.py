"""Why PyTorch does not start on a machine with torch-npu, in one sentence that says how to mend it.

`import torch` loads an installed torch-npu. Without CANN that raises an error; beside a build of PyTorch for CUDA it
ends the process (SIGABRT), which no `except` sees: where that may happen, the import is tried in another process first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from moeport.ascend.checks import fits, pin_of, torch_command
from moeport.ascend.installed import Machine, machine, package, torch_cuda
from moeport.errors import BackendUnavailableError
from moeport.processes import last_line, python_path

EXTENSION = "torch-npu"
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
WITHOUT = f"or do without NPUs: {AUTOLOAD}=0"
SECONDS = 300.0
"""How long a trial of `import torch` may take."""
_LIBRARY = re.compile(r"(lib[\w.+-]+\.so[\w.]*): cannot open shared object file")


@dataclass(frozen=True)
class Trouble:
    """Why PyTorch does not start, and how to mend it."""

    problem: str
    mend: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.mend}"


def explained(text: str, found: Machine | None = None) -> Trouble | None:
    """What the message of a failed `import torch` means; None if torch-npu has no part in it.

    Args:
        text: the message of the error and of those that led to it, or what the process wrote before it died.
        found: this machine; None: look.
    """
    if not re.search(r"torch_npu|Duplicated key", text):
        return None
    found = found or machine()
    npu, torch = found.packages.get("torch-npu"), found.packages.get("torch")
    if npu is None or torch is None:
        return None
    pin = pin_of(found)
    if "Duplicated key" in text or "Two accelerators" in text or found.torch_cuda:
        build = f"is a build for CUDA {found.torch_cuda}" if found.torch_cuda else "is a build for another accelerator"
        return Trouble(
            f"torch-npu {npu.version} does not work beside torch {torch.version}, which {build}",
            f"install the build that goes with it: {torch_command(found)}, {WITHOUT}",
        )
    if pin and not fits(torch.version, pin):
        return Trouble(
            f"torch-npu {npu.version} is for torch {pin}, and this is torch {torch.version}",
            f"{torch_command(found)}, {WITHOUT}",
        )
    if library := _LIBRARY.search(text):
        return Trouble(
            f"torch-npu {npu.version} is installed, but CANN is not in effect: {library[1]} is not found",
            f"{_cann(found)}, {WITHOUT}",
        )
    return Trouble(
        f"torch-npu {npu.version} does not load: {last_line(text) or 'it says nothing'}",
        f"see moeport doctor, {WITHOUT}",
    )


@contextmanager
def guarded(framework: str, extensions: Collection[str]) -> Iterator[None]:
    """The body imports a framework. Raises BackendUnavailableError in place of what torch-npu does to it.

    Args:
        framework: its module.
        extensions: packages that add devices to it, as in `BackendFacts.extensions`.
    """
    if EXTENSION in extensions and framework not in sys.modules and _loads_torch_npu() and torch_cuda():
        _try()  # or it may end this process
    try:
        yield
    except (ImportError, RuntimeError, OSError) as error:
        trouble = explained(messages(error)) if EXTENSION in extensions else None
        if trouble is None:
            raise
        os.environ.pop(AUTOLOAD, None)  # torch-npu sets it while it loads, and has not come to unset it
        raise BackendUnavailableError(f"PyTorch does not start: {trouble}") from error


def refuse_broken(extensions: Collection[str]) -> None:
    """Raises BackendUnavailableError if a framework does not start on this machine because of torch-npu.

    It is tried in a process of its own, where torch-npu is installed: for those who start others that import it.
    """
    if EXTENSION in extensions and _loads_torch_npu():
        _try()


def messages(error: BaseException | None) -> str:
    """The message of an error, and below it those of the errors that led to it."""
    texts = []
    while error is not None:
        texts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def _loads_torch_npu() -> bool:
    return package(EXTENSION) is not None and os.environ.get(AUTOLOAD) != "0"


def _try() -> None:
    """Import PyTorch in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", "import torch"],
            env=os.environ | {"PYTHONPATH": python_path()},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return  # no verdict: the import itself will say more
    trouble = explained(done.stderr) if done.returncode else None
    if trouble:
        raise BackendUnavailableError(f"PyTorch does not start: {trouble}")


def _cann(found: Machine) -> str:
    """How to put CANN into effect."""
    return f"source {found.set_env}" if found.set_env else "install CANN and source its set_env.sh"
