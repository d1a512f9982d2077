"""Which tests start processes, and which compute with MindSpore or torch_npu, found by rule."""

import functools
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import CodeType, FunctionType

STARTERS = ("tests.comm.jobs", "tests.jobs.ranks")
NPU_TESTS = Path(__file__).parents[1] / "npu"
WANTS_MINDSPORE = re.compile(r'^(\w+ = )?pytest\.importorskip\("mindspore"\)', re.MULTILINE)


def starts_processes(item):
    """Whether the test or a fixture of its comes, through functions of the tests, to something that starts any."""
    fixtures = [definition.func for found in item._fixtureinfo.name2fixturedefs.values() for definition in found]
    return any(_starts(function) for function in (item.function, *fixtures))


@functools.cache
def _starts(function):
    pending, seen = [inspect.unwrap(function)], set()
    while pending:
        current = pending.pop()
        if isinstance(current, type):
            pending += [value for value in vars(current).values() if isinstance(value, FunctionType)]
        if not isinstance(current, FunctionType) or current in seen:
            continue
        seen.add(current)
        globals_used = [current.__globals__.get(name) for name in _names(current.__code__)]
        for value in (*globals_used, *(current.__defaults__ or ()), *(current.__kwdefaults__ or {}).values()):
            module = str(getattr(value, "__module__", None))
            if value is subprocess or (isinstance(value, FunctionType | type) and _can_start(module)):
                return True
            if module.startswith("tests."):
                pending.append(inspect.unwrap(value) if callable(value) else value)
    return False


def _can_start(module):
    """Whether it is one of the tests' starters, or one of moeport's that use subprocess."""
    return module in STARTERS or (
        module.startswith("moeport.") and getattr(sys.modules[module], "subprocess", None) is subprocess
    )


def _names(code):
    """Names used in a function and in those inside it."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def uses_mindspore(item):
    """Whether the test, by its parameters, its module or its own words, needs MindSpore."""
    if _wants_mindspore(item.path):
        return True
    if _asks_for_mindspore(inspect.unwrap(item.function)):
        return True
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(_is_mindspore(value) for value in values)


@functools.cache
def _wants_mindspore(path):
    return bool(WANTS_MINDSPORE.search(path.read_text()))


@functools.cache
def _asks_for_mindspore(function):
    return 'importorskip("mindspore")' in inspect.getsource(function)


def _is_mindspore(value):
    if isinstance(value, str):
        return value.split("-")[0] in ("mindspore", "msrun")
    return getattr(value, "backend", None) == "mindspore"


def runs_torch_npu(item):
    """Whether the test is one of those that `make test-npu` runs."""
    return item.path.is_relative_to(NPU_TESTS)
