import importlib.util
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.optional import pytest_make_collect_report  # noqa: F401  (a hook)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")


LONGEST = (
    "comm/test_collectives.py",
    "comm/test_failures.py",
    "training/test_ranks.py",
    "backends/test_mindspore_training.py",
    "backends/test_mindspore.py",
    "training/test_across_backends.py",
    "training/test_ranks_train.py",
    "model/test_transformer.py",
    "routers/test_routers_on_backends.py",
    "parity/test_backends.py",
    "backends/test_doctor.py",
    "training/test_interruption.py",
)
"""Files that take longest, which start first so that no test process waits for another at the end."""


def pytest_collection_modifyitems(items):
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))
    wanting = [item for item in items if item.get_closest_marker("cuda")]
    if not wanting or has_cuda():
        return
    for item in wanting:
        item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; this machine has none"))


def pytest_terminal_summary(terminalreporter):
    """Say why tests were skipped, a line a reason."""
    reasons = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.items():
        terminalreporter.line(f"{count} tests skipped: {reason.removeprefix('Skipped: ')}", yellow=True)


def has_cuda():
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()
