"""Tests that need a package which is not installed are skipped, and say which; they are not errors.

A file is skipped if its imports need one. PyTorch, with which most tests compute without importing it, also excuses a
test that fails and says or prints that it is missing; no such excuse exists where PyTorch is installed.
"""

import importlib.util

import pytest

PACKAGES = (
    "datasets",
    "ipykernel",
    "jsonschema",
    "latex2mathml",
    "lm_eval",
    "matplotlib",
    "mindspore",
    "mlflow",
    "nbclient",
    "nbformat",
    "numba",
    "pyarrow",
    "sklearn",
    "swanlab",
    "tensorboard",
    "torch",
    "torch_npu",
    "transformers",
    "triton",
    "wandb",
)
"""What the suite uses where it is installed. numpy and whatever else moeport itself needs is always there."""


def installed(package):
    """Whether a package is there; for a test that does without it."""
    return importlib.util.find_spec(package) is not None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    missing = report.failed and _missing(report)
    if missing:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: the whole file needs {missing}, which is not installed")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and not installed("torch") and _misses_torch(report):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1], "Skipped: needs torch, which is not installed")
    return report


def _misses_torch(report):
    text = "\n".join([report.longreprtext, *(content for _, content in report.sections)])
    return "needs torch, which is not installed" in text or "No module named 'torch'" in text


def _missing(report):
    """The optional package that the import of a test file did not find; empty for any other failure."""
    error = report.call.excinfo.value.__cause__ if report.call.excinfo else None
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return package if package in PACKAGES else ""
