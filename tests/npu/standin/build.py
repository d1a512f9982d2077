"""Compiles the stand-in for CANN for whichever torch_npu is installed: cann.c, and the rest of what torch_npu needs."""

import ctypes
import re
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("cann.c")
LIBRARIES = (
    "libascendcl.so",
    "libacl_op_compiler.so",
    "libhccl.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
)
"""What torch_npu loads. Everything is in the first; the others need it, so that a search in them finds it too."""
LOOKED_UP = (
    "aclrtCtxSetSysParamOpt",
    "aclrtDestroyStreamForce",
    "aclrtGetStreamOverflowSwitch",
    "aclrtPeekAtLastError",
    "aclrtSetDeviceSatMode",
    "aclrtSetOpExecuteTimeOut",
    "aclrtSetOpWaitTimeout",
    "aclrtSetStreamAttribute",
    "aclrtSetStreamFailureMode",
    "aclrtSetStreamOverflowSwitch",
    "aclrtSetSysParamOpt",
    "aclrtSynchronizeDevice",
    "aclrtSynchronizeDeviceWithTimeout",
    "aclrtSynchronizeStreamWithTimeout",
)
"""Functions that torch_npu finds by name while it runs, so that they are no undefined symbols of its libraries."""
FOLDERS = ("runtime", "compiler", "opp")
"""Which torch_npu wants to be in the folder of CANN."""
FLAGS = ("-O1", "-shared", "-fPIC", "-w", "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN")


def build(torch_npu: Path, torch: Path, folder: Path) -> int:
    """Write the libraries into the folder.

    Args:
        torch_npu: folder of that package; it is not imported.
        torch: folder of PyTorch.
        folder: where to write; it is made.

    Returns: the number of functions that return 0 and do nothing else.
    """
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    written = set(re.findall(r"^[\w *]*?\b(\w+)\([^;]*\) \{", SOURCE.read_text(), re.MULTILINE))
    names = sorted({*needed(torch_npu, torch), *LOOKED_UP} - written)
    source = folder / "cann.c"
    source.write_text(SOURCE.read_text() + "".join(f"long {name}(void) {{ return SUCCESS; }}\n" for name in names))
    empty = folder / "empty.c"
    empty.write_text("")
    first, *others = LIBRARIES
    _compile(folder / first, source)
    for library in others:
        _compile(folder / library, empty, f"-L{folder}", "-lascendcl")
    return len(names)


def needed(torch_npu: Path, torch: Path) -> set[str]:
    """The symbols of torch_npu's libraries that neither they, PyTorch, Python nor the system define: those of CANN."""
    libraries = [*torch_npu.glob("_C*.so"), *(torch_npu / "lib").glob("*.so")]
    undefined = set().union(*(_symbols(library, "--undefined-only", "U") for library in libraries))
    defined = set().union(*(_symbols(library, "--defined-only", "") for library in libraries))
    known = [ctypes.CDLL(None)]
    for name in ("c10", "torch_cpu", "torch", "torch_python"):
        known.append(ctypes.CDLL(str(torch / "lib" / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL))
    return {name for name in undefined - defined if not any(hasattr(library, name) for library in known)}


def _symbols(library: Path, which: str, kind: str) -> set[str]:
    """Names of the dynamic symbols, without versions; of the kind that nm marks with that letter, if one is given."""
    lines = subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True).stdout.splitlines()
    rows = (line.split() for line in lines)
    return {name.partition("@")[0] for *_, letter, name in rows if not kind or letter == kind}


def _compile(library: Path, source: Path, *more: str) -> None:
    subprocess.run(["gcc", *FLAGS, f"-Wl,-soname,{library.name}", "-o", library, source, *more], check=True)
