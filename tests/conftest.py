import importlib.util
import os
from collections import Counter

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items):
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
