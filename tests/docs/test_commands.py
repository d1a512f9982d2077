"""What the README and the pages of Start and How-to say is done, page by page, in an empty folder.

A block that is not run says why in a comment above it: `<!-- needs: a GPU -->`, `<!-- not run: installs packages -->`.
Its commands and options must exist all the same.
"""

import re
from pathlib import Path

import pytest

from moeport.config import load_config
from tests.docs.blocks import blocks, commands
from tests.docs.lines import faults
from tests.docs.reader import Reader, agrees

REPOSITORY = Path(__file__).parents[2]
PAGES = ("README.md", "docs/index.md", "docs/getting-started.md", "docs/start/*.md", "docs/how-to/*.md")
FOUND = [path.relative_to(REPOSITORY).as_posix() for pattern in PAGES for path in sorted(REPOSITORY.glob(pattern))]
SLOW = {
    "README.md",
    "docs/index.md",
    "docs/getting-started.md",
    "docs/start/cluster.md",
    "docs/how-to/benchmark-a-cluster.md",
    "docs/how-to/compare-two-configs.md",
    "docs/how-to/resume-elsewhere.md",
}
"""Pages that take more than a few seconds: `make test-all` does what they say."""


def text_of(page):
    return (REPOSITORY / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", FOUND)
def test_every_program_command_and_option_exists(page):
    assert list(faults_of(page, text_of(page))) == []


def faults_of(page, text):
    for block in blocks(page, text):
        for command in commands(block) if block.language == "console" else []:
            for fault in faults(command.line, block.is_run):
                yield f"{command.place}: {fault}: {command.line}"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in FOUND])
def test_a_page_does_what_it_shows(monkeypatch, tmp_path, page):
    run = "".join(block.text for block in blocks(page, text_of(page)) if block.is_run)
    for framework in ("torch", *(["mindspore"] if "mindspore" in run else [])):
        pytest.importorskip(framework)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    do(tmp_path, page, text_of(page))


def do(folder, page, text):
    reader = Reader(folder)
    for block in blocks(page, text):
        if block.is_run:
            reader.do(block)


@pytest.mark.parametrize("page", FOUND)
def test_what_a_page_shows_does_not_depend_on_the_text_of_the_pages(page):
    """Else an edit of any of them could change what is printed: which documents are held out, and how many."""
    run = "".join(block.text for block in blocks(page, text_of(page)) if block.is_run)
    for path in set(re.findall(r"\bconfigs/[\w/.-]+\.yaml", run)):
        assert load_config(REPOSITORY / path).data.source.name == "stdlib", path


MARKED = {
    f"{block.place} {kind}: {block.marks[kind]}": block
    for page in FOUND
    for block in blocks(page, text_of(page))
    for kind in ("needs", "not run")
    if kind in block.marks
}


@pytest.mark.parametrize("place", MARKED)
def test_a_block_that_is_not_run_says_why(place):
    """The names of these tests are the list of such blocks."""
    assert not place.endswith(": ")


@pytest.mark.parametrize("page", [page for page in FOUND if page.startswith(("docs/start/", "docs/how-to/"))])
def test_a_page_begins_with_what_to_do(page):
    first = next(block for block in blocks(page, text_of(page)) if block.language != "text")
    assert int(first.place.rpartition(":")[2]) <= 20


PAGE = """
```yaml
# tiny.yaml
model: {num_layers: 1, d_model: 32, attention: {num_heads: 2}}
```

```console
$ moeport config check tiny.yaml
tiny.yaml: ok
1 block of width 32, ...
$ moeport config check missing.yaml
error: missing.yaml: ...
$ echo $?
2
```

```python
print("one and two")
```

```text
one ... two
```
"""
"""A page on which everything is right."""


class TestThePageThatIsWrong:
    """What the tests above find."""

    @pytest.fixture
    def result(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        return lambda text: do(tmp_path, "page", text)

    def test_nothing_where_all_is_right(self, result):
        assert list(faults_of("page", PAGE)) == []
        result(PAGE)

    @pytest.mark.parametrize(
        ("right", "wrong", "message"),
        [
            ("tiny.yaml: ok", "tiny.yaml: fine", r"page:7: .*\nshows:\ntiny.yaml: fine"),
            ("num_layers: 1", "num_layer: 1", "exit code 2 of: moeport config check tiny.yaml"),
            ("error: missing.yaml", "missing.yaml", "shows:"),
            ("\n2\n", "\n1\n", "the exit code is 2"),
            ("one ... two", "one ... three", r"page:17\nshows:\none ... three"),
        ],
    )
    def test_what_is_printed_otherwise(self, result, right, wrong, message):
        with pytest.raises(AssertionError, match=message):
            result(PAGE.replace(right, wrong))

    @pytest.mark.parametrize(
        ("line", "fault"),
        [
            ("moeport chek tiny.yaml", "moeport has no command chek"),
            ("moeport config check tiny.yaml --sett a=1", "moeport config check: No such option: --sett"),
            ("moeport config check", "moeport config check: file is missing"),
            ("moeport routers topk switch", "moeport routers: switch is an argument too many"),
            (
                "torchrun --nproc-per-node 2 -m moeport bench comm --bytes 4",
                "moeport bench comm: No such option: --bytes",
            ),
            ("moeport emulate --nodes 2 -- probe --fast", "moeport probe: No such option: --fast"),
            ("make trains", "no target trains in the Makefile"),
            ("gh repo clone", "gh is no program that the pages call"),
        ],
    )
    def test_what_does_not_exist_also_in_a_block_that_is_not_run(self, line, fault):
        page = f"<!-- not run: takes long -->\n```console\n$ {line}\n```\n"
        (found,) = faults_of("page", page)
        assert found.startswith(f"page:2: {fault}")

    def test_a_block_without_a_mark_that_no_test_runs(self):
        (found,) = faults_of("page", "```console\n$ make train\n```\n")
        assert found.startswith("page:1: make is for a checkout: say above the block what it needs")


@pytest.mark.parametrize(
    ("shown", "printed", "numbers_vary", "expected"),
    [
        ("a  b\nc", "a b c\n", False, True),
        ("│ a │\n╰───╯", "a", False, True),
        ("a \\\n  b", "a b", False, True),
        ("a \\ b", "a b", False, False),
        ("a\n...\nd", "a\nd\n", False, True),
        ("a\n...\nd", "a\nb\nc\nd\n", False, True),
        ("a\n...", "a\nb\n", False, True),
        ("a", "a\nb\n", False, False),
        ("a\n...\nd", "a\nb\nd\nc\n", False, False),
        ("loss: 2.54", "loss: 2.55", False, False),
        ("loss: 2.54, 1,024 tokens in 1m30s", "loss: 2.5e-05, 7 tokens in 59s", True, True),
        ("+0.0025 [-0.0022, +0.0071]", "-0.1 [-0.2, -1e-05]", True, True),
        ("loss: 2.54", "loss: nan", True, False),
        ("loss: 2.54", "lass: 2.54", True, False),
    ],
)
def test_when_a_page_shows_what_is_printed(shown, printed, numbers_vary, expected):
    assert agrees(shown, printed, numbers_vary) is expected
