"""TensorBoard events, written by the tensorboard package itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path


class EventLog:
    """Scalars in a TensorBoard event file. Raises ImportError if tensorboard is missing or broken.

    Args:
        folder: the log folder; made if it is missing.
        first_step: values from this step on in earlier event files of the folder are superseded.
    """

    def __init__(self, folder: Path, first_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder), flush_secs=10)
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars by tag."""
        summary = self._summary(value=[{"tag": tag, "simple_value": value} for tag, value in values.items()])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Flush pending events and close the file."""
        self._writer.close()
