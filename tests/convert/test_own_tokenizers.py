"""A run with a tokenizer that an ordinary tokenizer.json cannot express: used, exported, opened and read back."""

import json
import shutil

import pytest
import transformers
from rich.console import Console
from transformers import dynamic_module_utils

from moeport.convert.evaluation import _trust, evaluate
from moeport.convert.from_hf import from_hf
from moeport.convert.to_hf import to_hf
from moeport.data.tokenizer import load_tokenizer
from moeport.errors import DataError
from moeport.training.generate import generate
from moeport.training.run import train
from moeport.training.run_dir import read_config
from tests.training.tiny import LINES, tiny_config

OPTIONS = {"name": "lbpe", "vocab_size": 290, "base": "scaffold_bpe"}
TEXT = "".join(LINES[7:9]) + "naïve <|endoftext|>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    config = tiny_config(folder, data={"tokenizer": OPTIONS}, training={"steps": 2, "evaluation_interval": 0})
    train(config, console=Console(quiet=True))
    return config.run.dir


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "hf"
    to_hf(run, folder)
    return folder


@pytest.fixture(scope="module")
def back(exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("back") / "run"
    from_hf(exported, folder)
    return folder


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    return str(tmp_path / "a.txt")


def test_the_export_opens_with_the_ids_of_the_run(run, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    own = load_tokenizer(run / "tokenizer.json")
    opened = transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    assert opened(TEXT, split_special_tokens=True)["input_ids"] == own.encode_batch([TEXT])[0].tolist()
    assert (opened.eos_token_id, len(opened)) == (own.end_of_text, own.vocab_size)
    with pytest.raises(Exception, match="did not match any variant"):
        transformers.AutoTokenizer.from_pretrained(exported)


def test_the_export_comes_back_with_the_same_losses(run, exported, back, text_file):
    assert read_config(back).data.tokenizer.name == "file"
    assert load_tokenizer(back / "tokenizer.json").fingerprint == load_tokenizer(run / "tokenizer.json").fingerprint
    losses = [evaluate(place, [text_file]).total.bits_per_byte for place in (run, exported, back)]
    assert losses == [losses[0]] * 3
    texts = [generate(place, "def f7(x", max_tokens=9, temperature=0) for place in (run, back)]
    assert texts == [texts[0]] * 2


def test_the_way_there_and_back_keeps_the_code(exported, back, tmp_path):
    to_hf(back, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenization_moeport.py"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()


def test_only_our_own_code_is_run_for_tasks(exported, tmp_path):
    assert _trust(exported) == {"trust_remote_code": True}
    here = shutil.copytree(exported, tmp_path / "here")
    config = json.loads((here / "config.json").read_text())
    (here / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "other.Model"}}))
    assert _trust(here) == {}
    (here / "config.json").write_text(json.dumps(config))
    with (here / "tokenization_moeport.py").open("a") as file:
        file.write("\n")
    assert _trust(here) == {}
    (here / "tokenization_moeport.py").unlink()
    assert _trust(here) == {}


def test_another_tokenizer_in_its_place_is_refused(run, tmp_path):
    here = shutil.copytree(run, tmp_path / "run")
    tree = json.loads((here / "tokenizer.json").read_text())
    tree["model"]["encoding"] = "merges"
    (here / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"tokenizer\.json: is not the tokenizer that .* was trained with; restore it"):
        generate(here, "def")
