"""TensorBoard events, in the format of the tensorboard package."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from moeport.files import writing

FLUSH_SECONDS = 10.0
_number = count()


class EventLog:
    """Scalars in a TensorBoard event file. Raises ImportError if tensorboard is missing or broken.

    tensorboard's own writer has a thread, whose errors end in a traceback; this one writes where it is called.

    Args:
        folder: the log folder; made if it is missing.
        first_step: values from this step on in earlier event files of the folder are superseded.

    Raises WriteError, as its methods do, where the file cannot be written.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._folder = Event, Summary, folder
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.{next(_number)}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter((folder / name).open("wb"))
        self._flushed = 0.0
        self._add(file_version="brain.Event:2")
        self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars by tag."""
        self._add(
            step=step,
            summary=self._summary(value=[{"tag": tag, "simple_value": value} for tag, value in values.items()]),
        )

    def close(self) -> None:
        """Write out what is pending and close the file."""
        with writing(self._folder):
            self._writer.close()

    def _add(self, **fields: Any) -> None:
        now = time.time()
        with writing(self._folder):
            self._writer.write(self._event(wall_time=now, **fields).SerializeToString())
            if now - self._flushed > FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = now
