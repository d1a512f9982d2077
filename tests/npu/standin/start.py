"""Imported at the start of every Python process of .venv-npu for which MOEPORT_FAKE_CANN names the stand-in's folder.

It loads the stand-in's libraries, which takes no time, and gives torch_npu its emulated kernels as soon as something
imports it, as `import torch` does by itself.
"""

import ctypes
import importlib.abc
import importlib.machinery
import os
import sys
from pathlib import Path

from tests.npu.standin.build import LIBRARIES


class WithKernels(importlib.abc.MetaPathFinder):
    """Finds torch_npu, once, with a loader that installs the emulated kernels after it."""

    def find_spec(self, fullname, path, target=None):
        if fullname != "torch_npu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname)
        if spec is not None:
            spec.loader = Loader(fullname, spec.origin)
        return spec


class Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module):
        super().exec_module(module)
        from tests.npu.emulation import install

        install()


def start(folder):
    os.environ["ASCEND_LAUNCH_BLOCKING"] = "1"  # in the asynchronous queue an operator without a kernel can give zeros
    os.environ.setdefault("TORCH_NPU_FALLBACK_CPU_DISABLE", "1")  # nor does an operator run on the CPU unnoticed
    os.environ.setdefault("ASCEND_HOME_PATH", str(folder))  # as CANN's set_env.sh does; else torch_npu prints a warning
    os.environ.setdefault("ASCEND_OPP_PATH", str(folder / "opp"))
    for library in LIBRARIES:
        ctypes.CDLL(str(folder / library), mode=ctypes.RTLD_GLOBAL)
    sys.meta_path.insert(0, WithKernels())


start(Path(os.environ["MOEPORT_FAKE_CANN"]))
