import gc
import importlib.util
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.jobs import session, shorter  # noqa: F401  (shorter changes what it imports)
from tests.jobs.marks import runs_torch_npu, starts_processes, uses_mindspore
from tests.optional import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401  (hooks)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")


LONGEST = (
    "training/test_ranks.py",
    "comm/test_collectives.py",
    "comm/test_failures.py",
    "backends/test_mindspore_training.py",
    "faults/test_planted.py",
    "backends/test_doctor.py",
    "parity/test_backends.py",
    "faults/test_reliability.py",
    "backends/test_mindspore.py",
    "launch/test_launch_command.py",
    "launch/test_slurm_script.py",
    "routers/test_routers_on_backends.py",
    "training/test_ranks_train.py",
    "bench/test_moe.py",
    "parity/test_ranks.py",
    "training/test_run.py",
    "training/test_across_backends.py",
    "launch/test_emulation.py",
    "launch/test_launcher.py",
    "extensions/test_toy_router.py",
    "extensions/test_toy_exchange.py",
    "extensions/test_toy_metric.py",
    "extensions/test_toy_backend.py",
    "comm/test_probe_command.py",
    "test_collection.py",
    "convert/test_dcp.py",
    "core/test_drop.py",
    "core/test_losses.py",
    "faults/test_ranks_disagree.py",
    "faults/test_hostile_files.py",
    "docs/test_commands.py",
    "backends/test_torch_training.py",
    "conformance/test_backward.py",
    "conformance/test_forward.py",
    "training/test_lock.py",
    "vision/test_training.py",
    "faults/test_saves.py",
    "faults/test_signals.py",
    "training/test_generate.py",
    "training/test_start_memory.py",
    "training/test_tables.py",
    "test_wheel.py",
    "training/test_interruption.py",
    "comm/test_meeting.py",
    "bench/test_comm.py",
)
"""Files that take longest by processor time, their jobs included, which start first so that no test process waits for
another at the end.
"""
MARKS = {"ranks": starts_processes, "mindspore": uses_mindspore, "npu": runs_torch_npu}
"""Given by rule, so that no test has to be marked by hand."""
KEEPER = pytest.StashKey()


def pytest_configure(config):
    # A shell that runs a script in the background has its programs ignore it; tests raise and expect it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        config.stash[KEEPER] = session.begin()


def pytest_unconfigure(config):
    keeper = config.stash.get(KEEPER, None)
    for command in session.end(keeper) if keeper else []:
        print(f"left by a test, and ended now: {command}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))
    for item in items:
        for name, applies in MARKS.items():
            if applies(item):
                item.add_marker(name)
    skip_without(items, "cuda", has_cuda, "needs an NVIDIA GPU; this machine has none")
    reason = "needs the real torch_npu over a stand-in for CANN, with emulated kernels: make test-npu"
    skip_without(items, "npu", lambda: "MOEPORT_FAKE_CANN" in os.environ, reason)


def pytest_collection_finish():
    """What has been imported and collected stays, so the garbage collector need not walk it again and again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """Say why tests were skipped, a line a reason."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.items():
        terminalreporter.line(f"{count} tests skipped: {reason.removeprefix('Skipped: ')}", yellow=True)


def skip_without(items, mark, there, reason):
    """Skip the tests with that mark where what they need is not there."""
    wanting = [item for item in items if item.get_closest_marker(mark)]
    if wanting and not there():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason=reason))


def has_cuda():
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
