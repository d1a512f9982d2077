"""The processes of a job, connected before their framework communicates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NoReturn

from moeport.comm.agreement import Topic
from moeport.comm.liveness import Call, Listener, Liveness, port_at
from moeport.comm.meeting import Meeting
from moeport.launch.launcher import Launch


class Job:
    """This process as one of a job, from the meeting of its ranks to its end; or a process by itself.

    Use it as a context manager: leaving the block says goodbye, and an exception in the block stops every rank.

    Args:
        meeting: where the ranks meet; None for a process by itself.

    Raises:
        MeetingError: ranks are missing, or disagree on how many they are.
        RunError: rank 0 cannot be reached.
    """

    def __init__(self, meeting: Meeting | None):
        self.liveness: Liveness | None = None
        self.nodes: tuple[int, ...] = (0,)
        """Node number of each rank."""
        self._meeting = meeting
        if meeting:
            self._connect(meeting, meeting.launch)

    def _connect(self, meeting: Meeting, launch: Launch) -> None:
        records = meeting.gather()
        meeting.check_sizes(records)
        listener = Listener([record.address for record in records if record.rank]) if launch.rank == 0 else None
        described = meeting.share(listener.described() if listener else None)
        own = records[launch.rank].address
        address = (own, 0) if listener else (own, port_at(described, own))
        self.liveness = Liveness(launch.rank, launch.size, listener, address, described["token"], meeting.timeout_s)
        given = {tuple(record.nodes or ()) for record in records}
        alike = len(given) == 1 and () not in given
        self.nodes = launch.nodes or () if alike else self.liveness.nodes

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.nodes)

    def agree(self, *topics: Topic) -> None:
        """Compare what every rank must have alike; every rank calls it.

        Raises DisagreementError, the same on every rank, with the values of each, if something differs.
        """
        if self.liveness:
            self.liveness.agree(topics)

    @contextmanager
    def starting(self, what: str) -> Iterator[None]:
        """Watches the start of a library's communication, which takes over the address of the meeting."""
        assert self._meeting
        assert self.liveness
        with self.liveness.call(Call(tuple(range(self.size)), 1, what, series="start ")):
            self._meeting.free()
            self._meeting = None
            self.liveness.agree(())  # no rank looks for the library before the address is free
            yield

    def fail(self, error: Exception) -> NoReturn:
        """Stops every rank with the message of `error`; raises it where all ranks fail alike."""
        if self.liveness is None:
            raise error
        self.liveness.fail(error)

    def close(self) -> None:
        """Leaves without alarming the other ranks."""
        if self._meeting:
            self._meeting.leave()
        if self.liveness:
            self.liveness.close()

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif isinstance(error, Exception) and not (self.liveness and self.liveness.is_over):
            self.fail(error)
