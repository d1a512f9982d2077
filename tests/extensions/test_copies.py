import pytest

from moeport.version import VERSION
from tests.extensions.copies import Row, extended_copy

LINE = f'VERSION = "{VERSION}"'


def test_a_folder_a_file_and_an_edited_file_are_one_place_each(tmp_path):
    files = {"moeport/toy/__init__.py": "", "moeport/toy/inner/a.py": "A = 3", "moeport/core/toy.py": ""}
    rows = (Row("moeport/version.py", LINE, 'VERSION = "toy"'), Row("moeport/version.py", LINE, "import os"))
    copy = extended_copy(tmp_path, files, rows)
    assert copy.places == 3
    assert copy.moeport("--version").stdout.split()[1] == "toy"
    assert copy.python("-c", "from moeport.toy.inner.a import A; print(A)").stdout == "3\n"


@pytest.mark.parametrize(
    ("files", "row", "message"),
    [
        ({"moeport/version.py": ""}, Row("moeport/version.py", LINE, ""), "already exists"),
        ({}, Row("moeport/version.py", "VERSION", ""), "occurs 0 times; expected once"),
    ],
)
def test_an_extension_that_does_not_fit_is_refused(tmp_path, files, row, message):
    with pytest.raises(AssertionError, match=message):
        extended_copy(tmp_path, files, (row,))
