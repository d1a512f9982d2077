"""Words that depend on a number, and the lines that print such numbers."""

import pytest

from moeport.cli.config import summary
from moeport.cli.main import whole_command
from moeport.config import config_from_dict
from moeport.pages.words import counted
from moeport.training.task import build_task


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [
        (0, ["document"], "0 documents"),
        (1, ["document"], "1 document"),
        (1234, ["document"], "1,234 documents"),
        (1, ["file or row", "files or rows"], "1 file or row"),
        (2, ["file or row", "files or rows"], "2 files or rows"),
    ],
)
def test_one_is_not_several(number, words, expected):
    assert counted(number, *words) == expected


def test_a_model_of_one_block_and_one_expert():
    moe = {"num_experts": 1, "router": {"name": "switch"}}
    config = config_from_dict({"model": {"num_layers": 1, "d_model": 32, "attention": {"num_heads": 2}, "moe": moe}})
    assert summary(config)[0] == "1 block of width 32, 1 with 1 expert, 1 per token, router switch"


def test_a_text_of_one_document(tmp_path):
    (tmp_path / "one.txt").write_text("a text of some words\n" * 200)
    data = {"source": {"name": "files", "paths": [str(tmp_path / "one.txt")]}, "cache_dir": str(tmp_path / "cache")}
    task = build_task(config_from_dict({"data": {**data, "sequence_length": 8}}), report=lambda _: None)
    first, _, last = task.describe().partition(";")
    assert first.startswith("text        1 document, 0.0 MB")
    assert last == " 1 document held out"


@pytest.mark.parametrize(("nodes", "words"), [(1, "2 ranks: 1 node x 2"), (2, "4 ranks: 2 nodes x 2")])
def test_a_cluster_of_one_node(capsys, nodes, words):
    link = "10GB/s,5us"
    line = f"plan configs/quickstart.yaml --ranks-per-node 2 --nodes {nodes} --intra {link} --inter {link}"
    whole_command()([*line.split()], standalone_mode=False)
    assert capsys.readouterr().out.startswith(f"{words}\n")
