"""Exceptions that reach a user.

`UserError` is what the user can mend (exit code 2); `RunError` is what failed while running (exit code 1).
Each message says what is wrong, what was expected, what was received and how to fix it.
"""


class MoeportError(Exception):
    """Base class of every error that moeport raises on purpose."""

    exit_code = 1


class UserError(MoeportError):
    """Something the user can mend: a config, a path, a missing package."""

    exit_code = 2


class ConfigError(UserError):
    """A faulty configuration; the message lists every fault with file, line and key."""


class DataError(UserError):
    """Data that cannot be read or is not what the config promises."""


class CheckpointError(UserError):
    """A checkpoint that is missing, truncated, foreign or does not fit the config."""


class BackendUnavailableError(UserError):
    """A backend, device or dtype that cannot be used on this machine."""


class RunError(MoeportError):
    """A failure while running that no setting announced in advance."""


class NonFiniteError(RunError):
    """A NaN or infinity appeared; the message names the step and the tensor."""


class InterruptedRunError(RunError):
    """Ctrl-C or SIGTERM; what was done is saved, and the message says how to go on."""

    exit_code = 130
