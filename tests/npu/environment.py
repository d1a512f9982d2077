"""Makes the environment of `make test-npu`: the real torch_npu over a stand-in for CANN.

    python -m tests.npu.environment FOLDER [OPTION OF PIP ...]

The folder becomes a virtual environment that shares the packages of the interpreter that runs this. `.ok` in it says
that it is usable. Where torch_npu cannot be had, one line says why, there is no `.ok`, and the exit status is 0.
"""

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from tests.npu.standin.build import build

VERSION = "2.13.0"
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
ROOT = Path(__file__).parents[2]
START = """import os; os.environ.get("MOEPORT_FAKE_CANN") and __import__("tests.npu.standin.start")"""


def unfit():
    """Why torch_npu cannot run over the stand-in on this machine; empty if it can."""
    if sys.platform != "linux":
        return f"it exists for Linux only (this is {sys.platform})"
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed"
    version = runpy.run_path(str(package("torch") / "version.py"))
    if version["__version__"].split(".")[:2] != VERSION.split(".")[:2]:
        return f"it goes with PyTorch {VERSION.rpartition('.')[0]} (this is {version['__version__']})"
    if version["cuda"]:
        return (
            f"PyTorch {version['__version__']} is a CUDA build, beside which torch_npu ends the process; "
            f"use: make TORCH=torch=={VERSION}+cpu PIP_INSTALL_OPTIONS='--extra-index-url {CPU_BUILDS}'"
        )
    missing = [tool for tool in ("gcc", "nm") if not shutil.which(tool)]
    return f"the stand-in for CANN needs {' and '.join(missing)}" if missing else ""


def package(name):
    """The folder of an installed package, which is not imported."""
    return Path(importlib.util.find_spec(name).origin).parent


def make(folder, options):
    """Make the environment; empty, or why torch_npu cannot be installed."""
    venv.create(folder, clear=True, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder)}))
    shared = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site / "moeport.pth").write_text("\n".join([str(ROOT), *shared, START, ""]))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, "--target", site, f"torch-npu=={VERSION}", *options], stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        return "pip cannot install it: " + (done.stderr.strip() or "no reason given").splitlines()[-1]
    build(site / "torch_npu", package("torch"), folder / "cann")
    return ""


def check(folder):
    """See that it starts; if not, that is an error."""
    environment = {**os.environ, "MOEPORT_FAKE_CANN": str(folder / "cann")}
    program = "import torch; assert torch.accelerator.current_accelerator().type == 'npu'"
    subprocess.run([folder / "bin" / "python", "-c", program], env=environment, check=True)


def main(folder, *options):
    folder = Path(folder).resolve()
    (folder / ".ok").unlink(missing_ok=True)
    reason = unfit() or make(folder, options)
    if reason:
        print(f"torch_npu {VERSION} is not tested here: {reason}")
        return
    check(folder)
    (folder / ".ok").touch()


if __name__ == "__main__":
    main(*sys.argv[1:])
