"""Types of keys that hold paths: `~` and environment variables are expanded when a config is read."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer
from pydantic_core import PydanticCustomError

from moeport.errors import UserError
from moeport.paths import escaped, expanded


def _expand(value: Any) -> Any:
    """The value with what users may write in a path; anything that is no path is left to pydantic."""
    if not isinstance(value, str | Path):
        return value
    try:
        return type(value)(expanded(str(value)))
    except UserError as error:
        raise PydanticCustomError("path", "{reason}", {"reason": str(error)}) from error


def _escape(value: Any) -> str:
    return escaped(str(value))


UserPath = Annotated[Path, BeforeValidator(_expand), PlainSerializer(_escape, return_type=str, when_used="json")]
"""The path of a file or folder."""
UserPattern = Annotated[str, BeforeValidator(_expand), PlainSerializer(_escape, return_type=str, when_used="json")]
"""A string that may be a path, such as a glob."""
