"""`moeport eval --needle` and `--by-position`: what is printed, written and refused."""

import json
import shutil
import sys

import pytest
from rich.console import Console

from moeport.cli.main import main
from moeport.training.run import train
from tests.training.tiny import tiny_config

LINES = "".join(f"line {i} says {word} here\n" for i, word in enumerate(["apple", "brook", "cloud", "ember"] * 30))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run whose validation text is LINES, and its copy."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "held.txt").write_text(LINES)
    paths = {"paths": [str(folder / "text" / "0.txt")], "validation_paths": [str(folder / "held.txt")]}
    training = {"steps": 1, "evaluation_interval": 0}
    data = {"source": {"name": "files", **paths}}
    config = tiny_config(folder, training=training, data=data, checkpoint={"interval": 0})
    train(config, console=Console(quiet=True))
    shutil.copytree(folder / "run", folder / "copy")
    return [str(folder / "run"), str(folder / "copy")]


@pytest.fixture
def evaluate(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["moeport", "eval", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code, captured.out, captured.err

    return run


SMALL = ("--samples", "1", "--depths", "0,0.001", "--needles", "2", "--lengths", "240,300", "--backend", "numpy")
FORMS = ("--forms", "multi_key,variable_tracking,multi_key")


def test_two_runs_side_by_side_on_the_validation_text_of_the_first(runs, evaluate, tmp_path):
    files = ("--json", "a.json", "--html", "a.html")
    code, out, err = evaluate(*runs, "--needle", "--by-position", *SMALL, *FORMS, *files)
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["text"] == "the validation text"
    assert (found["options"]["lengths"], found["options"]["chance"]) == ([240, 300], 0.5)
    assert found["options"]["forms"] == ["multi_key", "variable_tracking"]
    assert [each["model"] for each in found["models"]] == ["run", "copy"]
    assert found["models"][0]["needles"] == found["models"][1]["needles"]
    for each in found["models"]:
        assert (each["checkpoint"], each["trained_length"]) == ("step-000001", 32)
        cells = {(cell["form"], cell["length"], cell["depth"]): cell for cell in each["needles"]}
        assert len(cells) == 2 * (3 + 1)
        total, *at = (cells["multi_key", 300, depth] for depth in (None, 0.0, 0.001))
        assert total["questions"] == 2
        assert total["nats"] == pytest.approx((at[0]["nats"] + at[1]["nats"]) / 2)
        assert total["choice_interval"][0] <= total["choice"] <= total["choice_interval"][1]
        assert f"{total['nats']:.3f}" in out
        assert each["positions"]["blocks"][-1]["last"] == 300
        assert len(each["positions"]["by_sequence"]) == 1
    page = (tmp_path / "a.html").read_text()
    assert page.count("<figure") == 2 * 2 + 1
    assert page.count("<th>0.1%</th>") == 2 * 2
    assert "(Student's t). Sequences: 1; documents: 1." in out
    assert out.splitlines()[-1] == "page: a.html"


def test_the_same_seed_gives_the_same_figures(runs, evaluate, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 5)):
        words = ("--needle", *SMALL, "--forms", "single", "--lengths", "150", "--seed", seed, "--json", f"{name}.json")
        assert evaluate(runs[0], *words)[0] == 0
    first, again, other = (json.loads((tmp_path / f"{name}.json").read_text())["models"] for name in "abc")
    assert first == again != other


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--needle",), "--lengths 32: form single with --needles 4 takes "),
        (("--needle", "--lengths", "x"), "--lengths x: not a list of numbers; expected such as --lengths 512,1024"),
        (("--needle", "--lengths", "0,9"), "--lengths 0: expected at least 1"),
        (("--needle", "--depths", "2"), "--depths 2: expected numbers from 0, the start of the text, to 1"),
        (("--needle", "--forms", "triple"), "--forms triple: is not a form; expected single, "),
        (("--needle", "--tasks", "a"), "--tasks: does not go with --needle and --by-position"),
        (("--by-position", "--stride", "4"), "--stride: does not go with --needle and --by-position"),
        (("--by-position", "--lengths", "9000"), "--lengths 9000: the longest document has "),
        (("--needle", "--text", "empty.txt"), "--text: there is no text in empty.txt"),
        (("--needle", "--limit", "4"), "--limit: does not go with --needle and --by-position"),
        (("--text", "empty.txt", "--html", "a.html"), "--html: is an option of --needle and --by-position"),
        (("--text", "empty.txt", "--samples", "3"), "--samples: is an option of --needle and --by-position"),
        (("second", "second", "--needle"), "second: is named more than once"),
        (("second", "--text", "empty.txt"), "2 models: --text and --tasks measure one at a time"),
    ],
)
def test_what_is_refused(runs, evaluate, tmp_path, words, message):
    (tmp_path / "empty.txt").write_text("")
    code, _, err = evaluate(runs[0], *words, "--backend", "numpy")
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert not (tmp_path / "a.html").exists()
