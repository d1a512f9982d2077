import os
import re
import subprocess
import sys

import numpy as np
import pytest

from moeport.config.data import BPETokenizer, ByteTokenizer, DataConfig, FilesSource, FileTokenizer
from moeport.data import Sampler, prepare_data
from moeport.errors import DataError, WriteError

BPE = BPETokenizer(vocab_size=300)


@pytest.fixture(autouse=True)
def _text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("data")
    for number in range(40):
        with open(f"data/{number}.txt", "w") as file:
            file.write(f"Text number {number} of the collection.\n" * 5)


def config(**options):
    defaults = {
        "source": FilesSource(paths=("data/*",)),
        "tokenizer": BPE,
        "sequence_length": 16,
        "validation_fraction": 0.2,
        "cache_dir": "cache",
    }
    return DataConfig(**{**defaults, **options})


def prepare(**options):
    lines = []
    return prepare_data(config(**options), report=lines.append), lines


def refused(message, **options):
    with pytest.raises(DataError, match=f"^{re.escape(message)}"):
        prepare(**options)


@pytest.fixture
def entry(tmp_path):
    prepare()
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer()], ids=["bpe", "byte"])
def test_the_tokens_are_the_text(tokenizer):
    data, _ = prepare(tokenizer=tokenizer)
    for tokens in (data.train, data.validation):
        targets = np.concatenate([targets.ravel() for _, targets in tokens.windows(4)])
        texts = data.tokenizer.decode(targets).split("<|endoftext|>")
        assert texts.pop() == ""
        assert len(texts) == tokens.num_documents
        assert all(re.fullmatch(r"(Text number \d+ of the collection\.\n){5}", text) for text in texts)
        assert sum(map(len, texts)) == tokens.num_bytes
    assert data.train.num_documents + data.validation.num_documents == 40
    assert set(data.baselines) == {"gzip", "xz"}
    assert Sampler(data.train.num_sequences, 2, 0).indices(0).max() < data.train.num_sequences


def test_the_second_call_takes_everything_from_the_cache(entry):
    before = {path.name: path.stat().st_mtime_ns for path in entry.iterdir()}
    first, lines = prepare()
    assert lines == [f"using {first.train.num_tokens:,} training tokens from the cache cache/{entry.name}"]
    assert {path.name: path.stat().st_mtime_ns for path in entry.iterdir()} == before
    assert set(before) == {
        "compression.json", "tokenizer.json", "train.json", "train.tokens", "validation.json", "validation.tokens"
    }  # fmt: skip


def test_progress():
    _, lines = prepare()
    assert lines == [
        "training a BPE tokenizer of 300 tokens on 34 documents (0.0 MB)",
        "encoding 34 documents (0.0 MB) for training and 6 documents (0.0 MB) for validation",
        "compressing 6 documents (0.0 MB) with gzip and xz for comparison",
    ]


def test_another_sequence_length_uses_the_same_tokens(entry):
    data, lines = prepare(sequence_length=7)
    assert len(lines) == 1
    assert data.train.sequence_length == data.validation.sequence_length == 7


def test_other_text_tokenizer_or_split_is_another_entry(entry):
    prepare(tokenizer=BPETokenizer(vocab_size=310))
    prepare(validation_fraction=0.3)
    with open("data/1.txt", "a") as file:
        file.write("more")
    prepare()
    os.rename("data/1.txt", "data/one.txt")
    prepare()
    assert len(os.listdir("cache")) == 5


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("train.tokens", lambda content: content[:-2], "the tokens are truncated or foreign"),
        ("validation.tokens", lambda content: b"\xff" + content[1:], "the checksum of the tokens"),
        ("train.json", lambda content: b'{"foreign": 1}', "not the metadata of a token file"),
        ("tokenizer.json", lambda content: content[:100], "not JSON"),
        ("tokenizer.json", lambda content: content.replace(b" ", b"  ", 1), "encoded with another tokenizer"),
        ("compression.json", lambda content: b'{"gzip": "x"}', "cannot read the compression baselines"),
    ],
)
def test_damaged_entries_are_built_again(entry, name, damage, reason):
    before = {path.name: path.read_bytes() for path in entry.iterdir()}
    (entry / name).write_bytes(damage(before[name]))
    _, lines = prepare()
    assert lines[0].startswith(
        f"warning: the cache is damaged and will be built again (cache/{entry.name}/{name}: "
    ) or (reason == "encoded with another tokenizer")
    assert reason in lines[0]
    assert {path.name: path.read_bytes() for path in entry.iterdir()} == before
    assert len(prepare()[1]) == 1


def test_exchanged_token_files_are_noticed(entry):
    for suffix in (".tokens", ".json"):
        os.rename(entry / f"train{suffix}", entry / "other")
        os.rename(entry / f"validation{suffix}", entry / f"train{suffix}")
        os.rename(entry / "other", entry / f"validation{suffix}")
    _, lines = prepare()
    assert "train.tokens: encoded from other documents" in lines[0]


def test_an_interrupted_entry_is_finished_without_a_warning(entry):
    (entry / "compression.json").unlink()
    (entry / "train.json").unlink()
    _, lines = prepare()
    assert lines[0].startswith("training a BPE tokenizer")
    assert len(prepare()[1]) == 1


def test_two_processes_at_once(tmp_path):
    code = (
        "from moeport.config.data import *\n"
        "from moeport.data import prepare_data\n"
        f"config = DataConfig.model_validate_json({config().model_dump_json()!r})\n"
        "data = prepare_data(config, report=lambda line: None)\n"
        "print(data.train.fingerprint, data.validation.fingerprint, data.tokenizer.fingerprint)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    data, lines = prepare()
    assert outputs == [f"{data.train.fingerprint} {data.validation.fingerprint} {data.tokenizer.fingerprint}\n"] * 2
    assert lines[0].startswith("using ")
    assert len(lines) == 1


def test_given_tokenizer(entry, tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes((entry / "tokenizer.json").read_bytes())
    data, lines = prepare(tokenizer=FileTokenizer(path=path))
    assert not any("training a BPE" in line for line in lines)
    assert data.tokenizer.fingerprint == prepare()[0].tokenizer.fingerprint
    path.write_text("{}")
    refused(f"{path}: JSON, but not a tokenizer.json", tokenizer=FileTokenizer(path=path))


def test_tokenizer_of_a_folder(entry, tmp_path):
    os.mkdir("folder")
    (tmp_path / "folder" / "tokenizer.json").write_bytes((entry / "tokenizer.json").read_bytes())
    data, _ = prepare(tokenizer=FileTokenizer(path="folder"))
    assert data.tokenizer.fingerprint == prepare()[0].tokenizer.fingerprint
    refused("data.tokenizer.path: the folder data has no tokenizer.json; ", tokenizer=FileTokenizer(path="data"))


def test_tokenizer_by_its_name_on_the_hub(entry, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--owner--model-1.5B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_bytes((entry / "tokenizer.json").read_bytes())
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    data, _ = prepare(tokenizer=FileTokenizer(path="owner/model-1.5B"))
    assert data.tokenizer.fingerprint == prepare()[0].tokenizer.fingerprint
    refused(
        f"data.tokenizer.path: 'owner/other' is not a file or folder, and the hub's cache {tmp_path}/hub has none of "
        "that name; HF_HUB_OFFLINE is set: run `hf download owner/other tokenizer.json` where",
        tokenizer=FileTokenizer(path="owner/other"),
    )
    refused("data/none.json: cannot read the tokenizer: No such file", tokenizer=FileTokenizer(path="data/none.json"))


def test_a_tokenizer_is_downloaded_where_that_is_allowed(tmp_path, monkeypatch):
    def unreachable(name, file):
        raise ConnectionError(f"no route to {name}/{file}")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(DataError, match=r"it cannot be downloaded \(no route to owner/model/tokenizer.json\): "):
        prepare(tokenizer=FileTokenizer(path="owner/model"))


def test_default_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    prepare(cache_dir=None)
    assert len(os.listdir("xdg/moeport")) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    prepare(cache_dir=None)
    assert len(os.listdir("home/.cache/moeport")) == 1


def test_cache_that_cannot_be_written():
    open("file", "w").close()
    with pytest.raises(
        WriteError,
        match=r"^file/cache/[0-9a-f]{32}: cannot be written: a part of the path is a file, not a folder; choose "
        r"another place \(data.cache_dir or XDG_CACHE_HOME sets the folder\)$",
    ):
        prepare(cache_dir="file/cache")


def test_text_shorter_than_one_sequence():
    refused(
        "the training text is too short: it has 5,770 tokens and one sequence of data.sequence_length 100,000 "
        "needs 100,001; add documents or lower data.sequence_length",
        tokenizer=ByteTokenizer(),
        sequence_length=100_000,
    )
