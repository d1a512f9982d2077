"""Names of frameworks that are not public, which any release may rename or remove: found at the start, or named.

Each adapter lists those that it uses in a table of its own, `NAMES` of its `private.py`, which is the only file that
uses them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from moeport.errors import BackendUnavailableError


def missing(names: Iterable[str]) -> list[str]:
    """Those that the installed framework does not have.

    Args:
        names: each a module and an attribute of it, such as `torch.autograd:_profiler_enabled`. The attribute may be
            one of an attribute, or one that a class declares and only its instances have.
    """
    return [name for name in names if not _exists(name)]


def require(framework: str, version: str, names: Mapping[str, str], install: str) -> None:
    """Raise BackendUnavailableError, which lists them, where the installed framework lacks any of these names.

    Args:
        framework: what users call it.
        version: the installed one.
        names: what is looked for, and what each is used for.
        install: how to install releases that have all of them.
    """
    if gone := missing(names):
        listed = "; ".join(f"{name.replace(':', '.')} ({names[name]})" for name in gone)
        raise BackendUnavailableError(
            f"{framework} {version} lacks {len(gone)} of the {len(names)} names that moeport uses although they are "
            f"not public: {listed}; expected a release that moeport was tried with; {install}"
        )


def _exists(name: str) -> bool:
    module, _, attributes = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for attribute in attributes.split("."):
            declared = inspect.get_annotations(found) if isinstance(found, type) else {}
            found = declared[attribute] if attribute in declared else getattr(found, attribute)
    except (ImportError, AttributeError):
        return False
    return True
