"""TensorBoard events, in the format of the tensorboard package."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from typing_extensions import override

from moeport.training.trackers.tracker import Ending, Row, Start, Tracker

FLUSH_SECONDS = 10.0
_number = count()


class TensorBoard(Tracker):
    """Scalars in a TensorBoard event file; config and summary as texts.

    tensorboard's own writer has a thread, whose errors end in a traceback; this one writes where it is called. A new
    event file supersedes the values of earlier ones from its first step on.
    """

    def __init__(self, start: Start):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._step = Event, Summary, start.done
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.{next(_number)}"
        start.folder.mkdir(parents=True, exist_ok=True)
        self._writer = RecordWriter((start.folder / name).open("wb"))
        self._flushed = 0.0
        self._add(time.time(), file_version="brain.Event:2")
        self._add(time.time(), step=start.done + 1, session_log=SessionLog(status=SessionLog.START))
        self._text("config", start.config)

    @override
    def log(self, rows: Sequence[Row]) -> None:
        for row in rows:
            values = [{"tag": tag, "simple_value": value} for tag, value in row.values.items()]
            self._add(row.time, step=row.step, summary=self._summary(value=values))
            self._step = row.step

    @override
    def summary(self, values: Mapping[str, Any]) -> None:
        self._text("summary", values)

    @override
    def close(self, ending: Ending) -> None:
        self._writer.close()

    def _text(self, tag: str, values: Mapping[str, Any]) -> None:
        """Write values as JSON, for the tab of texts."""
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.plugins.text.metadata import create_summary_metadata

        text = f"```json\n{json.dumps(values, indent=2)}\n```"
        tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()])
        value = {"tag": tag, "metadata": create_summary_metadata(tag, ""), "tensor": tensor}
        self._add(time.time(), step=self._step, summary=self._summary(value=[value]))

    def _add(self, wall_time: float, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=wall_time, **fields).SerializeToString())
        now = time.monotonic()
        if now - self._flushed > FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = now
