"""Every reader meets every hostile file: it refuses it in one line that names it, and never hangs or crashes."""

import json
import subprocess
import sys

import pytest

from moeport.errors import MoeportError
from tests.faults.hostile import CONTENTS, FORMATS, NO_FILES, READERS, TOLERANT, mutated, read_hostile


def check_message(message, reader):
    """One line; configs and sources list their faults, a line each."""
    lines = message.splitlines()
    assert len(lines) == 1 or (reader in ("config", "rows") and len(lines) <= 60)
    assert max(map(len, lines)) < 1200


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_file_is_refused(tmp_path, reader, what):
    said = read_hostile(reader, NO_FILES[what], tmp_path)
    assert said is not None
    message, code = said
    assert code == 2
    check_message(message, reader)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", CONTENTS)
def test_a_hostile_file_is_refused(tmp_path, reader, what):
    said = read_hostile(reader, CONTENTS[what], tmp_path)
    if said is None:
        assert reader in TOLERANT or (what, reader) in TAKEN
        return
    message, code = said
    assert code == 2
    check_message(message, reader)


TAKEN = {
    ("empty", "config"),
    ("an object", "config"),
    ("an object", "names"),
    ("numbers beyond numbers", "names"),
    ("half a surrogate pair", "names"),
    ("markup and escapes", "names"),
}
"""What is right for a reader, though odd."""


@pytest.mark.parametrize("reader", FORMATS)
def test_wrong_values_in_the_right_format(tmp_path, reader):
    """Each part of a right file in turn is another value: refused in one line, or taken where it is no fault."""
    name, make, write, use = FORMATS[reader]
    right = make(tmp_path)
    path = tmp_path / name
    refused = taken = 0
    said = []
    for place, other, value in mutated(right):
        write(path, value)
        try:
            use(path)
            taken += 1
        except MoeportError as error:
            refused += 1
            said.append((str(error), error.exit_code, place, other))
        except BaseException as error:
            raise AssertionError(f"{place} = {other!r}: {error!r}") from error
    assert [each for each in said if "\n" in each[0] or each[1] != 2] == []
    assert refused > taken / 4
    write(path, right)


@pytest.mark.slow
def test_time_and_memory_are_bounded():
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.hostile", "6000"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["seconds"] < 5, found  # of processor time; a terminal's user sees less than 2 on an idle machine
    assert found["added_mib"] < 500, found
