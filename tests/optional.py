"""Tests that need a package which is not installed are skipped, and say which; they are not errors.

A file is skipped if its imports need one, and a test if it fails and what it says or prints is that one is missing.
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
    package = _named(report) if report.failed else ""
    if package:
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1], f"Skipped: needs {package}, which is not installed")
    return report


def _named(report):
    """The first optional package that is not installed and that a report calls missing; empty: there is none."""
    text = "\n".join([report.longreprtext, *(content for _, content in report.sections)])
    signs = ("needs {0}, which is not installed", "No module named '{0}'", "import of {0} halted")
    named = (each for each in PACKAGES if any(sign.format(each) in text for sign in signs))
    return next((each for each in named if not installed(each)), "")


def _missing(report):
    """The optional package that the import of a test file did not find; empty for any other failure."""
    error = report.call.excinfo.value.__cause__ if report.call.excinfo else None
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    return package if package in PACKAGES else ""
