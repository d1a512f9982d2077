"""Backends by name, imported only when asked for."""

from __future__ import annotations

import importlib
from typing import Any

from moeport.ascend.trouble import guarded
from moeport.backends.base import Backend
from moeport.comm.job import Job
from moeport.config.training import BackendConfig
from moeport.errors import BackendUnavailableError
from moeport.facts import BACKENDS
from moeport.launch.launcher import Launch
from moeport.launch.orphans import end_with_launcher


def get_backend(config: BackendConfig) -> Backend:
    """The backend that the config names, on its device.

    Raises BackendUnavailableError, with what to do, if its framework, device or dtype is missing.
    """
    facts = BACKENDS[config.name]
    backend: type[Backend] = found(config.name, facts.module, facts.cls)
    return backend(config)


def found(name: str, module: str, attribute: str, asked: str | None = None) -> Any:
    """Something in a module that needs the framework of a backend; `asked` is what the user asked for.

    Raises BackendUnavailableError, with what to do, if the framework is missing.
    """
    try:
        with guarded(BACKENDS[name].framework, BACKENDS[name].extensions):
            return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("moeport"):
            raise
        raise BackendUnavailableError(
            f"{asked or f'backend.name: {name}'} needs {error.name}, which is not installed; install it with: "
            f"{BACKENDS[name].install}"
        ) from error


def join_job(launch: Launch | None, timeout_s: float, config: BackendConfig) -> Job:
    """This process as one of its job, before any framework communicates. Does not return in msrun's scheduler.

    Args:
        launch: this process; None: it is by itself.
        timeout_s: longest time that ranks may take to come.
        config: for the scheduler, which needs the device.

    Raises MeetingError, with what is waited for, if the ranks do not find each other.
    """
    if launch is None:
        return Job(None)
    end_with_launcher()
    if launch.is_scheduler:
        own = config if config.name == launch.backend else BackendConfig(name=launch.backend)
        get_backend(own).communicator(launch, timeout_s)
    meeting_of = found(launch.backend, BACKENDS[launch.backend].rendezvous, "meeting_of")
    return Job(meeting_of(launch, timeout_s))
