"""Packages that moeport can use and does not require."""

from importlib import import_module
from typing import Any

from moeport.errors import MoeportError, UserError


def load(module: str, use: str, extra: str, error: type[MoeportError] = UserError, package: str = "") -> Any:
    """Import a module of an optional package.

    Args:
        module: its name.
        use: what needs it, for the message.
        extra: the extra of moeport that brings it.
        error: is raised if it cannot be imported; the message says whether it is missing or broken.
        package: its name for pip, if it is not that of the module.
    """
    top, install = module.partition(".")[0], f"pip install 'moeport[{extra}]'"
    name = package or top
    try:
        import_module(top)
        return import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name == top:
            raise error(f"{use} needs the package `{name}`: {install}") from missing
        raise _broken(error, use, name, install, missing) from missing
    except ImportError as broken:
        raise _broken(error, use, name, install, broken) from broken


def _broken(error: type[MoeportError], use: str, name: str, install: str, reason: ImportError) -> MoeportError:
    said = " ".join(str(reason).split())
    return error(
        f"{use} needs the package `{name}`, which is installed but fails to import: {said}; install releases that fit "
        f"each other, for instance in a new environment with {install}"
    )
