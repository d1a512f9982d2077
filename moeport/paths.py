"""Paths as users write them: with `~` for a home folder and with environment variables."""

from __future__ import annotations

import os
import re

from moeport.errors import UserError

_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<braced>[^}]*)\})")


def expanded(path: str) -> str:
    """The path with `$NAME` and `${NAME}` replaced by environment variables, and then `~` or `~user` by a home folder.

    `$$` stands for a dollar sign, and `./~` begins a name with a tilde.

    Raises:
        UserError: names the variable that is not set or empty, or the user that has no home folder.
    """
    result = _VARIABLE.sub(_value, path)
    home = os.path.expanduser(result)
    if home.startswith("~"):
        user = home.partition("/")[0]
        raise UserError(f"there is no home folder for {user}; write ./{user} for a folder of that name")
    return home


def escaped(path: str) -> str:
    """A path that `expanded` turns back into `path`."""
    return ("./" if path.startswith("~") else "") + path.replace("$", "$$")


def _value(found: re.Match[str]) -> str:
    if found["dollar"]:
        return "$"
    name = found["name"] or found["braced"]
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise UserError(
            f"{found.group()} is not an environment variable; write $NAME, ${{NAME}}, or $$ for a dollar sign"
        )
    value = os.environ.get(name)
    if not value:
        state = "is not set" if value is None else "is empty"
        raise UserError(f"the environment variable {name} {state}; set it, or write $$ for a dollar sign")
    return value
