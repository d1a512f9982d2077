"""Backends by name, imported only when asked for."""

from __future__ import annotations

import importlib

from moeport.backends.base import Backend
from moeport.config.training import BackendConfig
from moeport.errors import BackendUnavailableError
from moeport.facts import BACKENDS


def get_backend(config: BackendConfig) -> Backend:
    """The backend that the config names, on its device.

    Raises BackendUnavailableError, with what to do, if its framework, device or dtype is missing.
    """
    facts = BACKENDS[config.name]
    try:
        backend: type[Backend] = getattr(importlib.import_module(facts.module), facts.cls)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("moeport"):
            raise
        raise BackendUnavailableError(
            f"backend.name: {config.name} needs {error.name}, which is not installed; install it with: {facts.install}"
        ) from error
    return backend(config)
