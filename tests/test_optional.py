"""The message about an optional package that is missing or broken."""

import re

import pytest

from moeport.errors import DataError, UserError
from moeport.optional import load


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "--x needs the package `absent-package`: pip install 'moeport[plot]'"),
        (
            "raise ImportError('needs NumPy 2.0 or newer,\\n found 1.26.4')",
            "--x needs the package `absent-package`, which is installed but fails to import: needs NumPy 2.0 or newer, "
            "found 1.26.4; install releases that fit each other, for instance in a new environment with pip install "
            "'moeport[plot]'",
        ),
        (
            "import absent_package_needs_this",
            "--x needs the package `absent-package`, which is installed but fails to import: No module named "
            "'absent_package_needs_this'; install releases that fit",
        ),
    ],
)
def test_a_package_that_cannot_be_imported(tmp_path, monkeypatch, text, message):
    monkeypatch.syspath_prepend(tmp_path)
    if text is not None:
        (tmp_path / "absent_package.py").write_text(text)
    for error in (UserError, DataError):
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            load("absent_package", "--x", "plot", error, package="absent-package")


def test_a_package_that_can_be_imported():
    assert load("xml.etree.ElementTree", "x", "data").fromstring("<a/>").tag == "a"
