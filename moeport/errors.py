"""Exceptions that users see.

`UserError` is something the user can fix (exit code 2); `RunError` is a failure during a run (exit code 1).
Each message says what is wrong, what was expected, what was received and how to fix it.
"""

from collections.abc import Collection
from difflib import get_close_matches

LONGEST_NAME = 64
"""Characters up to which a name is compared with others to find the one that was meant."""


def choices(name: str, known: Collection[str]) -> str:
    """The end of a message on an unknown name: what would be right, and the name that was probably meant."""
    close = get_close_matches(name.lower(), known, 1) if len(name) <= LONGEST_NAME else []
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"expected one of {', '.join(known)}{hint}"


class MoeportError(Exception):
    """Base class of every error that moeport raises deliberately."""

    exit_code = 1


class UserError(MoeportError):
    """Something the user can fix: a config, a path, a missing package."""

    exit_code = 2


class ConfigError(UserError):
    """A faulty configuration; the message lists every fault with file, line and key."""


class DataError(UserError):
    """Data that cannot be read or does not match the config."""


class CheckpointError(UserError):
    """A checkpoint that is missing, truncated, written by another program or incompatible with the config."""


class BackendUnavailableError(UserError):
    """A backend, device or dtype that cannot be used on this machine."""


class WriteError(UserError):
    """A file or folder that cannot be written; the message says which, why and what helps."""


class MeetingError(UserError):
    """The ranks of a job do not find each other: somebody is missing, or an address or a port is wrong."""


class DisagreementError(UserError):
    """The ranks of a job were started differently; raised on all of them, with the values of each."""


class RunError(MoeportError):
    """A failure during a run that no check of the config could foresee."""


class NonFiniteError(RunError):
    """A NaN or infinity appeared; the message names the step and the tensor.

    Args:
        message: what the user reads.
        step: the step, counted from 1; None: the one that is being done.
    """

    def __init__(self, message: str, step: int | None = None):
        super().__init__(message)
        self.step = step


class InterruptedRunError(RunError):
    """A signal that asks for an end. Progress is saved, and the message says how to continue."""

    exit_code = 130
