"""Corpora of real size: shards, processes, what a killed process left, and what is not read again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models
from typer.testing import CliRunner

from moeport.cli.main import app
from moeport.config.data import BPETokenizer, ByteTokenizer, DataConfig, FilesSource, HuggingFaceSource
from moeport.data import (
    compression,
    entry,
    huggingface,
    prepare_data,
    scans,
    shared,
    token_files,
    trained_tokenizer,
)
from moeport.data.documents import Document, Documents, documents_fingerprint, is_validation
from moeport.data.encoders import encoded_batches
from moeport.data.packed import PackedTokens
from moeport.data.token_files import shard_path, write_tokens
from moeport.data.tokenizer import Tokenizer, train_bpe
from moeport.errors import DataError

DOCUMENTS = [Document(f"{number}", f"Document {number}: naïve text. " * (number % 7 + 1)) for number in range(60)]
BPE = train_bpe((document.text for document in DOCUMENTS), 300)


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moeport.files.sync", lambda path: None)  # no test here cuts the power


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(token_files, "TOKENS_PER_SHARD", 200)
    monkeypatch.setattr(token_files, "CHARACTERS_PER_BATCH", 200)


def config(**options):
    defaults = {"source": FilesSource(paths=("a.jsonl",)), "tokenizer": ByteTokenizer(), "cache_dir": "cache"}
    return DataConfig(**{"sequence_length": 16, "validation_fraction": 0.2, **defaults, **options})


def write_corpus(documents=DOCUMENTS):
    with open("a.jsonl", "w") as file:
        file.writelines(json.dumps({"text": document.text}) + "\n" for document in documents)


def prepare(**options):
    lines = []
    workers = options.pop("workers", None)
    return prepare_data(config(**options), report=lines.append, workers=workers), lines


def stream(tokenizer, documents=DOCUMENTS):
    """All tokens, computed with everything in memory."""
    end = [tokenizer.end_of_text]
    return np.concatenate(
        [end, *(part for ids in tokenizer.encode_batch([d.text for d in documents]) for part in (ids, end))]
    )


def test_shards_are_the_stream_cut_after_documents(tmp_path, small_shards):
    metadata = write_tokens(tmp_path / "train.tokens", iter(DOCUMENTS), BPE)
    whole = write_tokens(tmp_path / "one.tokens", DOCUMENTS[:2], BPE)
    assert whole.shards == ()
    assert len(metadata.shards) > 4
    parts = [np.fromfile(shard_path(tmp_path / "train.tokens", n), "<u2") for n in range(len(metadata.shards))]
    expected = stream(BPE)
    np.testing.assert_array_equal(np.concatenate(parts), expected)
    assert all(200 <= len(part) < 200 + 7 * 40 for part in parts[:-1])
    assert all(part[-1] == BPE.end_of_text for part in parts)
    assert metadata.source_fingerprint == documents_fingerprint(DOCUMENTS)
    assert sum(shard.num_documents for shard in metadata.shards) == metadata.num_documents == 60
    packed = PackedTokens(tmp_path / "train.tokens", 7)
    inputs, targets = zip(*(packed.sequence(index) for index in range(packed.num_sequences)), strict=True)
    np.testing.assert_array_equal(np.concatenate(inputs), expected[: packed.num_sequences * 7])
    np.testing.assert_array_equal(np.concatenate(targets), expected[1 : packed.num_sequences * 7 + 1])
    long = PackedTokens(tmp_path / "train.tokens", 1000)  # spans several shards
    np.testing.assert_array_equal(long.sequence(0)[0], expected[:1000])
    np.testing.assert_array_equal(packed.token_counts(), np.bincount(expected, minlength=BPE.vocab_size))
    np.testing.assert_array_equal(packed.first(50), expected[1:51])


def test_the_fingerprint_does_not_depend_on_the_shards(tmp_path, monkeypatch):
    one = write_tokens(tmp_path / "one.tokens", DOCUMENTS, BPE)
    monkeypatch.setattr(token_files, "TOKENS_PER_SHARD", 200)
    several = write_tokens(tmp_path / "several.tokens", DOCUMENTS, BPE)
    assert one.sha256 == several.sha256
    assert (len(one.shards), len(several.shards) > 4) == (0, True)


def test_a_damaged_shard_is_noticed(tmp_path, small_shards):
    write_tokens(tmp_path / "train.tokens", DOCUMENTS, BPE)
    path = shard_path(tmp_path / "train.tokens", 3)
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    with pytest.raises(DataError, match=r"train-3\.tokens: the checksum of the tokens is not the one in"):
        PackedTokens(tmp_path / "train.tokens", 7)


def test_what_goes_wrong_in_a_process_is_said():
    words = Tokenizer(HFTokenizer(models.WordLevel({"<|endoftext|>": 0, "text": 1})).to_str())
    assert [[ids.tolist() for ids in each] for each in encoded_batches(words, [["text", "text"]], 2)] == [[[1], [1]]]
    with pytest.raises(DataError, match=r"the tokenizers library gave up \(WordLevel error: Missing \[UNK\] token"):
        list(encoded_batches(words, [["text"], ["unknown"]], 2))


def test_a_process_that_cannot_start_is_named(monkeypatch):
    monkeypatch.setattr("sys.executable", "/absent/python")
    cannot = r"^cannot start a process that encodes text \(No such file or directory\); if the memory was full"
    with pytest.raises(DataError, match=cannot):
        list(encoded_batches(BPE, [["text"]], 3))


KILLED = """
import os, signal, sys
from moeport.config.data import DataConfig
from moeport.data import prepare_data, token_files
token_files.TOKENS_PER_SHARD, token_files.CHARACTERS_PER_BATCH = 200, 200
def progress(what, done, total):
    if what == "encoding" and done > int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
prepare_data(DataConfig.model_validate_json(sys.argv[1]), report=print, progress=progress)
"""


def test_after_kill_9_finished_shards_are_kept(small_shards):
    write_corpus()
    options = config(tokenizer=BPETokenizer(vocab_size=300))
    run = subprocess.run([sys.executable, "-c", KILLED, options.model_dump_json(), "4000"], capture_output=True)
    assert run.returncode == -signal.SIGKILL
    (folder,) = Path("cache").iterdir()
    unfinished = json.loads((folder / "unfinished.json").read_text())
    *kept, damaged = [shard_path(folder / "train.tokens", n) for n in range(len(unfinished["shards"]["train"]))]
    assert len(kept) > 1
    before = [path.stat().st_mtime_ns for path in kept]
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    data, lines = prepare(tokenizer=BPETokenizer(vocab_size=300))
    assert lines[0].startswith(f"continuing in {folder}: {len(kept) + 1} shards of tokens there")
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert not [path.name for path in folder.iterdir() if path.name.endswith(".tmp") or "unfinished" in path.name]
    again, _ = prepare(tokenizer=BPETokenizer(vocab_size=300), cache_dir="other")
    assert data.train.metadata == again.train.metadata
    assert data.validation.metadata == again.validation.metadata


def test_keys_and_tokens_are_those_of_versions_that_held_all_text_in_memory():
    os.mkdir("data")
    for number in range(40):
        Path(f"data/{number}.txt").write_text(f"Text number {number} of the collection.\n" * 5)
    data, _ = prepare(source=FilesSource(paths=("data/*",)))
    assert os.listdir("cache") == ["9a58dbe9830b8a9565f1e16e67064e03"]
    assert data.train.fingerprint == "3d969e7d84730d49c1054f001a90d074211f951993ffd5ef2bdd26bcf220c18c"
    assert data.validation.fingerprint == "b2e381601ab64576a688ad1ccb8678bd5604ef2a29a2f135b9bc89534f4b4292"
    prepare(source=FilesSource(paths=("data/*",)), tokenizer=BPETokenizer(vocab_size=300))
    assert "32b751995152d412a11c056be785c781" in os.listdir("cache")


def test_the_whole_path_gives_the_tokens_of_everything_in_memory(small_shards, monkeypatch):
    monkeypatch.setattr(shared, "MEMORY_PER_PART", 1)  # every part is a file
    rows = [*DOCUMENTS, *DOCUMENTS[:20]]
    write_corpus(rows)
    data, _ = prepare(tokenizer=BPETokenizer(vocab_size=300), workers=2)
    named = [Document(f"a.jsonl:{number}", document.text) for number, document in enumerate(rows, 1)]
    train = [document for document in named if not is_validation(document.name, 0.2)]
    texts = {document.text for document in train}
    held_out = [each for each in named if is_validation(each.name, 0.2) and each.text not in texts]
    assert len(train) + len(held_out) < len(named)
    tokenizer = train_bpe((document.text for document in train), 300)
    assert data.tokenizer.fingerprint == tokenizer.fingerprint
    for packed, documents in ((data.train, train), (data.validation, held_out)):
        np.testing.assert_array_equal(packed.first(10**6), stream(tokenizer, documents)[1:])
        assert packed.metadata.source_fingerprint == documents_fingerprint(documents)


def test_a_source_that_changes_while_it_is_read_is_refused(monkeypatch):
    """And leaves nothing that a later start would take for the documents of the source."""
    write_corpus()
    os.utime("a.jsonl", (time.time() - 100,) * 2)
    monkeypatch.setattr(scans, "MIN_BYTES", 1)
    write = entry.write_tokens

    def changed(*args):
        return write(*args).model_copy(update={"source_fingerprint": "another"})

    with monkeypatch.context() as patch:
        patch.setattr(entry, "write_tokens", changed)
        with pytest.raises(DataError, match=r"^data\.source: the documents were changed while they were read; start a"):
            prepare()
    assert not [path.name for path in Path("cache").rglob("*") if path.name.startswith(("scan-", "unfinished"))]
    assert not any(line.startswith("continuing") for line in prepare()[1])


class TestLargeSourcesAreReadOnce:
    @pytest.fixture(autouse=True)
    def _large(self, monkeypatch):
        write_corpus()
        self.age("a.jsonl")
        monkeypatch.setattr(scans, "MIN_BYTES", 1)

    @staticmethod
    def age(path, seconds=100.0):
        os.utime(path, (time.time() - seconds,) * 2)

    def reads(self, monkeypatch, **options):
        """How often the source was read for its split."""
        calls, split = [], scans.split

        def counted(*args):
            calls.append(args)
            return split(*args)

        with monkeypatch.context() as patch:
            patch.setattr(scans, "split", counted)
            self.data, _ = prepare(**options)
        return len(calls)

    def test_while_nothing_changes(self, monkeypatch):
        assert self.reads(monkeypatch) == 1
        first = self.data
        assert self.reads(monkeypatch) == 0
        assert self.data.train.metadata == first.train.metadata
        assert self.reads(monkeypatch, tokenizer=BPETokenizer(vocab_size=300)) == 0
        assert self.reads(monkeypatch, validation_fraction=0.4) == 1

    def test_a_change_is_noticed(self, monkeypatch):
        self.reads(monkeypatch)
        first = self.data
        self.age("a.jsonl", 50.0)
        assert self.reads(monkeypatch) == 1
        write_corpus(DOCUMENTS[:50])
        self.age("a.jsonl")
        assert self.reads(monkeypatch) == 1
        assert self.data.train.metadata != first.train.metadata

    def test_a_change_that_sets_its_time_back_is_noticed(self, monkeypatch):
        status = os.stat("a.jsonl")
        self.reads(monkeypatch)
        content = Path("a.jsonl").read_bytes()
        with open("a.jsonl", "r+b") as file:
            file.write(content.replace(b"Document", b"document"))
        os.utime("a.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))
        after = os.stat("a.jsonl")
        assert (after.st_size, after.st_mtime_ns, after.st_ino) == (status.st_size, status.st_mtime_ns, status.st_ino)
        assert self.reads(monkeypatch) == 1

    def test_a_file_that_was_just_changed_is_not_trusted(self, monkeypatch):
        self.age("a.jsonl", 0.0)
        assert self.reads(monkeypatch) == 1
        assert self.reads(monkeypatch) == 1

    def test_texts_of_both_sides_are_left_out_again(self, monkeypatch):
        write_corpus([*DOCUMENTS, *DOCUMENTS[:20]])
        self.age("a.jsonl")
        first, lines = prepare()
        assert "left out, since the same text is used for training" in lines[0]
        shutil.rmtree(next(path for path in Path("cache").iterdir() if path.is_dir()))
        assert self.reads(monkeypatch) == 0
        assert self.data.train.metadata == first.train.metadata
        assert self.data.validation.metadata == first.validation.metadata
        assert prepare()[1][0] == lines[0]

    def test_what_was_skipped_is_said_again(self):
        with open("a.jsonl", "a") as file:
            file.write("no JSON\n")
        self.age("a.jsonl")
        source = FilesSource(paths=("a.jsonl",), bad_files="skip")
        first, second = prepare(source=source), prepare(source=source)
        assert first[1][0] == second[1][0]
        assert first[0].unreadable == second[0].unreadable == 1


def test_of_much_text_a_sample_trains_the_tokenizer(monkeypatch):
    write_corpus()
    monkeypatch.setattr(trained_tokenizer, "MAX_TOKENIZER_BYTES", 2000)
    corpus = scans.scanned(config(), scans.LeftOut(), lambda what, done, total: None)
    sampled = list(trained_tokenizer.tokenizer_texts([corpus.train]))
    assert 500 < sum(len(text.encode()) for text in sampled) < 4000 < corpus.train.num_bytes
    assert sampled == list(trained_tokenizer.tokenizer_texts([corpus.train]))
    _, lines = prepare(tokenizer=BPETokenizer(vocab_size=300))
    assert lines[0].startswith("training a BPE tokenizer of 300 tokens on a sample of 0 MB of 4")


def test_a_sample_of_one_long_document_has_parts_of_it(monkeypatch):
    monkeypatch.setattr(trained_tokenizer, "MAX_TOKENIZER_BYTES", 20_000)
    monkeypatch.setattr(trained_tokenizer, "CHARACTERS_PER_PIECE", 100)
    text = "".join(f"Line {number} of a long text.\n" for number in range(5000))
    documents = Documents(lambda: iter([Document("a", text)]), 1, len(text), "")
    sampled = list(trained_tokenizer.tokenizer_texts([documents]))
    assert 15_000 < sum(map(len, sampled)) < 25_000
    assert all(len(part) <= 100 and part in text for part in sampled)


def test_of_much_text_the_first_documents_are_compressed(monkeypatch):
    monkeypatch.setattr(compression, "MAX_BYTES", len(DOCUMENTS[0].text.encode()) + 1)
    assert compression.compression_baselines(DOCUMENTS) == compression.compression_baselines(DOCUMENTS[:2])


class TestStreaming:
    @pytest.fixture(autouse=True)
    def _dataset(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        os.mkdir("set")
        write_corpus()
        os.rename("a.jsonl", "set/train.jsonl")

    def source(self, **options):
        return HuggingFaceSource(dataset="./set", **options)

    def test_texts_are_those_without_streaming_and_are_read_once(self):
        whole, _ = prepare(source=self.source())
        streamed, _ = prepare(source=self.source(streaming=True))
        assert streamed.train.metadata == whole.train.metadata
        (kept,) = Path("cache").glob("stream-*.jsonl.gz")
        os.rename("set/train.jsonl", "set/other.txt")
        assert prepare(source=self.source(streaming=True), validation_fraction=0.3)[0].train.num_documents < 60
        kept.write_bytes(kept.read_bytes()[:-20])
        with pytest.raises(DataError, match=r"stream-\w+\.jsonl\.gz: damaged \(.*\); delete it, and it will be"):
            prepare(source=self.source(streaming=True))

    def test_a_stream_that_breaks_off(self, monkeypatch):
        def rows(*args):
            yield DOCUMENTS[0]
            raise ConnectionResetError("reset by peer")

        monkeypatch.setattr(huggingface, "row_documents", rows)
        with pytest.raises(
            DataError, match=r"^\./set:train: reading the stream was interrupted \(reset by peer\); start ag"
        ):
            prepare(source=self.source(streaming=True))
        assert not [path for path in Path("cache").iterdir() if path.name.startswith((".", "stream-"))]

    def test_a_column_that_is_not_there(self):
        with pytest.raises(DataError, match=r"no column 'body'; columns: text; set data\.source\.text_field"):
            prepare(source=self.source(streaming=True, text_field="body"))
        assert not list(Path("cache").glob("stream-*"))


def test_commands():
    write_corpus()
    Path("config.yaml").write_text(
        "data: {source: {name: files, paths: [a.jsonl]}, tokenizer: {name: byte}, sequence_length: 16, cache_dir: "
        "cache}\n"
    )

    def lines(*command):
        done = CliRunner().invoke(app, ["data", *command, "config.yaml"])
        assert (done.exit_code, done.exception) == (0, None)
        return done.stdout.splitlines()

    before = lines("show")
    assert before[1:] == [
        "train       53 documents (0.0 MB); not ingested",
        "validation  7 documents (0.0 MB); not ingested",
    ]
    assert not os.path.exists("cache")
    ingested = lines("ingest")
    assert ingested[0] == "encoding 53 documents (0.0 MB) for training and 7 documents (0.0 MB) for validation"
    assert ingested[-3:] == lines("show")
    assert ingested[-3] == before[0]
    folder = Path(before[0].removeprefix("folder").strip())
    tokens = (folder / "train.tokens").stat().st_size // 2
    assert ingested[-2] == (
        f"train       53 documents (0.0 MB); {tokens:,} tokens in 1 shard of 2 bytes per token, vocabulary of 257"
    )
    (folder / "compression.json").unlink()
    (folder / "unfinished.json").write_text(
        '{"tokenizer_fingerprint": "x", "shards": {"train": [{"num_tokens": 5, "num_documents": 1, "sha256": "x"}]}}'
    )
    assert lines("show")[1] == "train       53 documents (0.0 MB); interrupted: 5 tokens in 1 shard"
