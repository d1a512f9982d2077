"""What the processes of a part are told, and what they compute on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moeport.backends import get_backend, join_job
from moeport.backends.base import Backend
from moeport.comm.communicator import Communicator
from moeport.config import config_from_dict
from moeport.config.training import BackendConfig
from moeport.launch.launcher import launched
from moeport.training.agreed import of_backend

TASK_FILE, VALUE_FILE, EVENTS_FILE = "task.json", "value.json", "events.jsonl"
COLLECTIVE_SECONDS = 60.0
"""Time that a collective of a part may take."""


@dataclass(frozen=True)
class Task:
    """One stage of a part."""

    part: str
    stage: int
    backend: str
    device: str
    dtypes: tuple[str, ...]
    """Compute types that work on the device."""
    ranks: int
    """Of this stage."""
    all_ranks: int
    """Of a stage with one rank per device."""
    quick: bool
    folder: str
    """Where it leaves what it finds; the processes run in it."""
    after: str | None = None
    """Go on after this case, which has ended the process before."""

    def write(self) -> None:
        """Write it to its folder, for its processes."""
        Path(self.folder, TASK_FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Task:
        """The task that was written to a folder."""
        values = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
        return cls(**values | {"dtypes": tuple(values["dtypes"])})

    def config(self, dtype: str, **changes: Any) -> BackendConfig:
        """The backend's section of a config."""
        values = {"name": self.backend, "device": self.device, "dtype": dtype, **changes}
        return config_from_dict({"backend": values}).backend

    def open(self, dtype: str, **changes: Any) -> Backend:
        """The backend in one compute type."""
        return get_backend(self.config(dtype, **changes))

    @contextmanager
    def world(self, dtype: str) -> Iterator[tuple[Backend, Communicator]]:
        """The backend and all ranks of this stage."""
        launch = launched()
        with join_job(launch, COLLECTIVE_SECONDS, self.config(dtype)) as job:
            backend = self.open(dtype)
            job.agree(of_backend(backend))
            with backend.communicator(launch, COLLECTIVE_SECONDS, job) as communicator:
                yield backend, communicator

    def event(self, value: Mapping[str, Any]) -> None:
        """Note something at once, since the process may not live to the end."""
        with Path(self.folder, EVENTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")

    @contextmanager
    def case(self, label: str) -> Iterator[dict[str, Any]]:
        """One case: notes that it begins, and what was put into the dictionary when it ends."""
        self.event({"begin": label})
        found: dict[str, Any] = {}
        yield found
        self.event({"end": label, **found})

    def remaining(self, labels: list[str]) -> list[str]:
        """The labels after the case that ended the process before; all if there was none."""
        return labels[labels.index(self.after) + 1 :] if self.after in labels else labels


def describe(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
