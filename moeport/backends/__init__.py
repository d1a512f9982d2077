"""Backends by name, imported only when asked for."""

from __future__ import annotations

import importlib

from moeport.backends.base import Backend
from moeport.config.training import BackendConfig
from moeport.errors import BackendUnavailableError

BACKENDS = {
    "torch": ("moeport.backends.torch.backend", "TorchBackend", "pip install 'moeport[torch]'"),
    "mindspore": ("moeport.backends.mindspore.backend", "MindSporeBackend", "pip install 'moeport[mindspore]'"),
    "numpy": ("moeport.backends.numpy_ref.backend", "NumpyBackend", "pip install moeport"),
}
"""Name to module, class, and the command that installs what it needs."""


def get_backend(config: BackendConfig) -> Backend:
    """The backend that the config names, on its device.

    Raises BackendUnavailableError where its framework, device or dtype is missing, with what to do.
    """
    module, cls, command = BACKENDS[config.name]
    try:
        backend: type[Backend] = getattr(importlib.import_module(module), cls)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("moeport"):
            raise
        raise BackendUnavailableError(
            f"backend.name: {config.name} needs {error.name}, which is not installed; install it with: {command}"
        ) from error
    return backend(config)
