"""What became of the tries of one kind of fault."""

import os
import signal
import subprocess
from dataclasses import dataclass, field

from tests.faults.runs import HANG_SECONDS


@dataclass
class Tally:
    """A row of the table of docs/reliability.md. The lists hold the tries that went wrong."""

    fault: str
    tries: int = 0
    lost: list[str] = field(default_factory=list)
    """Something that was saved is gone or wrong, or a wrong result was given for a right one."""
    hangs: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    """Tracebacks, internal errors and crashes."""

    def ended(self, name, run, allowed):
        """Wait for a command; its exit code, or None if that is none of those allowed."""
        try:
            code = run.wait()
        except subprocess.TimeoutExpired:
            self.hangs.append(f"{name}: no end within {HANG_SECONDS} s")
            os.kill(run.process.pid, signal.SIGKILL)
            run.wait()
            return None
        said = run.said()
        if "Traceback" in said or "internal error" in said or code not in allowed:
            self.tracebacks.append(f"{name}: exit {code}: {said[-600:]}")
            return None
        return code

    def right(self, name, differences):
        """Count what is not as it should be as lost."""
        if differences:
            self.lost.append(f"{name}: {differences}")

    def add(self, other):
        """Count another tally's tries as one's own."""
        self.tries += other.tries
        self.lost += other.lost
        self.hangs += other.hangs
        self.tracebacks += other.tracebacks

    @property
    def wrong(self):
        """All tries that went wrong."""
        return self.lost + self.hangs + self.tracebacks

    def row(self):
        """A line of the table, in Markdown."""
        counts = (self.tries, len(self.lost), len(self.hangs), len(self.tracebacks))
        return f"| {self.fault} | " + " | ".join(map(str, counts)) + " |"
