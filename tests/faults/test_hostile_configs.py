"""Configs that are made to be expensive or to garble a terminal: each is refused soon, in few and plain lines."""

import re
import time
from itertools import pairwise

import pytest

from moeport.cli.main import main
from moeport.config.load import MOST_SHOWN

NAMES = "abcdefghijklmnopqrst"


def aliases(first, body):
    """Twenty values, each of which repeats the one before as `body` says."""
    lines = [f"a: &a {first}"]
    lines += [f"{name}: &{name} {body.replace('?', '*' + before)}" for before, name in pairwise(NAMES)]
    return "\n".join(lines)


HOSTILE = {
    "a bomb of lists": (aliases("[x, x]", "[?, ?, ?, ?]"), "more than 20,000 keys and values"),
    "a bomb of mappings": (aliases("{x: 1}", "{l: ?, r: ?}"), "more than 20,000 keys and values"),
    "a bomb of merges": (aliases("{x: 1}", "{<<: [?, ?, ?, ?]}"), "more than 20,000 keys and values"),
    "a bomb at a known key": (
        aliases("[x, x]", "[?, ?, ?, ?]") + "\ndata: {source: {name: files, paths: *t}}",
        "more than 20,000 keys and values",
    ),
    "an alias of itself": ("a: &a [*a]\nmodel: &m {moe: *m}", "contains itself"),
    "a billion layers": ("model: {num_layers: 1000000000}", "at most 10000"),
    "digits without end": ("model: {d_model: " + "9" * 100_000 + "}", "not a finite number of 64 bits"),
    "unknown keys": ("model:\n" + "".join(f"  key_{i}: 1\n" for i in range(9_000)), "more faults"),
    "unknown sections": ("".join(f"key_{i}: {{a: 1}}\n" for i in range(4_000)), "more faults"),
    "a long unknown key": ("model: {? " + "k" * 100_000 + " : 1}", "unknown key"),
    "a long choice": ("model: {moe: {router: {name: " + "topk" * 20_000 + "}}}", "is not a choice"),
    "wrong items": ("data: {source: {name: files, paths: [" + "1," * 9_000 + "]}}", "more faults"),
    "a key given often": ("model:\n" + "  d_model: 1\n" * 9_000, "more faults"),
    "too many values": ("model:\n" + "".join(f"  key_{i}: 1\n" for i in range(30_000)), "more than 20,000"),
    "a large file": ("# \n" * 400_000, "larger than 1,048,576 bytes"),
    "deep lists": ("model: " + "[" * 50_000, "nested too deeply"),
    "deep mappings": ("model: " + "{a: " * 5_000 + "}" * 5_000, "nested too deeply"),
    "deep blocks": ("".join(" " * i + "a:\n" for i in range(1_000)), "nested too deeply"),
    "escape sequences": (r'model: {"\e[31mred\u202e": 1, d_model: "\e[2J\x07"}', r"\x1b[31mred\u202e"),
    "markup": ('model: {"[red]x[/red]": 1, d_model: "[link=a]b[/link]"}', "[red]x[/red]"),
    "a tag of Python": ("model: !!python/object/apply:os.system [true]", "is not allowed"),
    "many documents": ("---\n" * 10_000, "expected a single document"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused(tmp_path, monkeypatch, capsys, name):
    text, expected = HOSTILE[name]
    file = tmp_path / "c.yaml"
    file.write_text(text)
    monkeypatch.setattr("sys.argv", ["moeport", "config", "check", str(file)])
    before = time.thread_time()
    with pytest.raises(SystemExit) as exit_:
        main()
    assert time.thread_time() - before < 20, "seconds of computing; the slowest takes about one"
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert expected in err
    assert len(err.splitlines()) <= MOST_SHOWN + 2
    assert len(err) < 400 * (MOST_SHOWN + 2)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", err)
    assert "Traceback" not in err
