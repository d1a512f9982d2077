"""Makes packages seem not to be installed, in this process and its children.

MOEPORT_WITHOUT=mindspore,sklearn PYTHONPATH=tests/without:. python -m pytest --collect-only -q
"""

import os
import sys
from importlib.machinery import PathFinder

MISSING = frozenset(filter(None, os.environ.get("MOEPORT_WITHOUT", "").split(",")))


class Finder(PathFinder):
    """Finds what PathFinder finds, but for the missing packages."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        if fullname.partition(".")[0] in MISSING:
            return None
        return super().find_spec(fullname, path, target)


if MISSING:
    sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
