"""What `make generate` writes is up to date, and `--check` finds what is not."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.extensions.copies import extended_copy

ROOT = Path(__file__).parents[1]


def test_every_generated_piece_is_up_to_date():
    done = subprocess.run([sys.executable, "docs/generate", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    return extended_copy(tmp_path, {})


def test_a_stale_piece_is_found_and_renewed(copy):
    page = copy.root / "docs" / "routers.md"
    fresh = page.read_text()
    page.write_text(fresh.replace("| [`topk`](#topk) | ", "| [`topk`](#topk) | more than "))
    stale = copy.python("docs/generate", "--check")
    assert (stale.returncode, stale.stdout) == (1, "docs/routers.md: stale; run make generate\n")
    assert page.read_text() != fresh
    assert copy.python("docs/generate").stdout == "docs/routers.md: written\n"
    assert page.read_text() == fresh


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("<!-- end of overview -->", "", "the region overview has no end"),
        ("generated: overview", "generated: overwiev", "expected ['overview', 'without balance loss']"),
    ],
)
def test_a_region_without_its_marks_is_refused(copy, old, new, message):
    page = copy.root / "docs" / "routers.md"
    page.write_text(page.read_text().replace(old, new))
    assert message in copy.python("docs/generate", "--check").stderr
