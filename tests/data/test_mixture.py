"""Several sources, mixed by weight."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moeport.cli.main import app
from moeport.config import config_from_dict
from moeport.config.data import SEQUENCES_PER_CYCLE, BPETokenizer, ByteTokenizer, DataConfig, FilesSource
from moeport.data import MixedTokens, prepare_data
from moeport.data.documents import is_validation
from moeport.data.sampler import MixedSampler, apportioned
from moeport.data.tokenizer import train_bpe
from moeport.errors import ConfigError, DataError

SIZES, WEIGHTS = {"web": 700, "code": 90, "books": 5}, {"web": 6.0, "code": 3.0, "books": 1.0}


def sampler(batch_size=12, seed=3):
    return MixedSampler(SIZES, WEIGHTS, batch_size, seed)


class TestSampler:
    def test_every_cycle_has_the_shares_and_every_source_its_epochs(self):
        drawn = np.concatenate([sampler(64).indices(step) for step in range(2 * SEQUENCES_PER_CYCLE // 64)])
        starts = np.cumsum([0, *SIZES.values()])
        for number, (size, share) in enumerate(zip(SIZES.values(), (0.6, 0.3, 0.1), strict=True)):
            own = drawn[(starts[number] <= drawn) & (drawn < starts[number + 1])] - starts[number]
            in_cycle = sampler().per_cycle[number]
            assert abs(in_cycle - share * SEQUENCES_PER_CYCLE) < 1
            assert len(own) == 2 * in_cycle
            epochs = own[: len(own) // size * size].reshape(-1, size)
            assert len(epochs) >= 3
            assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
            assert len({tuple(epoch) for epoch in epochs}) > 2
        assert drawn.dtype == np.int64

    def test_a_cycle_is_mixed(self):
        first = sampler(400).indices(0)
        assert [((lo <= first) & (first < hi)).sum() for lo, hi in ((0, 700), (700, 790), (790, 795))] == [248, 115, 37]

    def test_the_order_is_a_format(self):
        # Checkpoints resume by step number, so the order of a seed must not change.
        assert sampler().indices(0).tolist() == [756, 543, 794, 425, 717, 704, 792, 294, 645, 432, 636, 576]

    def test_any_step_can_be_resumed_by_any_number_of_ranks(self):
        whole = sampler()
        expected = [whole.indices(step) for step in range(700)]  # three cycles
        for step in (699, 0, 341, 342, 7):
            np.testing.assert_array_equal(sampler().indices(step), expected[step])
            np.testing.assert_array_equal(whole.indices(step), expected[step])
            for ranks in (1, 2, 5):
                parts = [sampler().rank_indices(step, rank, ranks) for rank in range(ranks)]
                np.testing.assert_array_equal(np.concatenate(parts), expected[step])

    def test_what_was_drawn_is_known_without_drawing(self):
        numbers = dict.fromkeys(SIZES, 0)
        for step in range(700):
            assert sampler().drawn(step) == numbers
            for name, low, high in (("web", 0, 700), ("code", 700, 790), ("books", 790, 795)):
                indices = sampler().indices(step) if step % 50 == 0 else None
                if indices is not None:
                    found = int(((low <= indices) & (indices < high)).sum())
                    assert sampler().drawn(step + 1)[name] - sampler().drawn(step)[name] == found
            numbers = sampler().drawn(step + 1)

    def test_apportioned(self):
        assert apportioned([6, 3, 1], 4096).tolist() == [2457, 1229, 410]
        assert apportioned([1, 1, 1], 4).tolist() == [2, 1, 1]


@pytest.fixture
def _texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in (("web", 30), ("code", 12)):
        os.mkdir(name)
        for number in range(count):
            Path(name, f"{number}.txt").write_text(f"{name} {number} of {count}.\n" * (number % 4 + 2))


def values(**options):
    sources = [
        {"name": "web", "weight": 3, "source": {"name": "files", "paths": ["web"]}},
        {"name": "code", "source": {"name": "files", "paths": ["code"]}},
    ]
    data = {"sources": sources, "tokenizer": {"name": "byte"}, "sequence_length": 16, "cache_dir": "cache"}
    return {"data": {**data, "validation_fraction": 0.2, **options}}


def prepare(**options):
    lines = []
    return prepare_data(config_from_dict(values(**options)).data, report=lines.append), lines


def alone(name):
    config = DataConfig(
        source=FilesSource(paths=(name,)),
        tokenizer=ByteTokenizer(),
        sequence_length=16,
        validation_fraction=0.2,
        cache_dir="cache",
    )
    return prepare_data(config, report=lambda line: None)


@pytest.mark.usefixtures("_texts")
class TestPrepared:
    def test_each_source_has_the_tokens_and_the_entry_that_it_has_alone(self):
        mixed, _ = prepare()
        entries = set(os.listdir("cache"))
        parts = {name: alone(name) for name in ("web", "code")}
        assert set(os.listdir("cache")) == entries
        train = mixed.train
        assert isinstance(train, MixedTokens)
        assert {name: part.fingerprint for name, part in train.parts.items()} == {
            name: part.train.fingerprint for name, part in parts.items()
        }
        first = parts["web"].train.num_sequences
        assert train.num_sequences == first + parts["code"].train.num_sequences
        inputs, targets = train.batch(np.array([first, 0, first - 1, train.num_sequences - 1]))
        rows = [parts["code"].train.sequence(0), parts["web"].train.sequence(0), parts["web"].train.sequence(first - 1)]
        rows.append(parts["code"].train.sequence(parts["code"].train.num_sequences - 1))
        np.testing.assert_array_equal(inputs, [row[0] for row in rows])
        np.testing.assert_array_equal(targets, [row[1] for row in rows])
        held_out = [part.validation for part in parts.values()]
        assert sum(targets.size for _, targets in mixed.validation.windows(4)) == sum(
            p.num_tokens - 1 for p in held_out
        )
        assert mixed.validation.num_bytes == sum(part.num_bytes for part in held_out)
        expected = sum(part.baselines["gzip"] * part.validation.num_bytes for part in parts.values())
        assert mixed.baselines["gzip"] == pytest.approx(expected / mixed.validation.num_bytes)
        web, code = (part.train for part in parts.values())
        shares = 0.75 * web.token_counts() / web.num_tokens + 0.25 * code.token_counts() / code.num_tokens
        np.testing.assert_allclose(train.token_counts(), shares * train.num_tokens, atol=1)

    def test_weights_and_names_are_part_of_the_fingerprint(self):
        prints = {prepare()[0].train.fingerprint}
        for change in ({"weight": 2}, {"name": "pages"}):
            sources = values()["data"]["sources"]
            sources[0] |= change
            prints.add(prepare(sources=sources)[0].train.fingerprint)
        assert len(prints) == 3

    def test_one_tokenizer_is_trained_on_all_sources_and_kept(self):
        data, lines = prepare(tokenizer={"name": "bpe", "vocab_size": 300})
        documents = data.train.num_documents
        assert lines[0].startswith(f"training a BPE tokenizer of 300 tokens on {documents} documents (0.0 MB)")
        again, lines = prepare(tokenizer={"name": "bpe", "vocab_size": 300})
        assert all(line.startswith("using ") for line in lines)
        assert again.tokenizer.fingerprint == data.tokenizer.fingerprint
        paths = [path for name in ("web", "code") for path in sorted(Path(name).iterdir())]
        texts = [path.read_text() for path in paths if not is_validation(str(path), 0.2)]
        assert data.tokenizer.fingerprint == train_bpe(texts, 300).fingerprint

    def test_no_text_is_held_out_in_one_source_and_trained_on_in_another(self):
        held_out = next(path for path in sorted(Path("code").iterdir()) if is_validation(str(path), 0.2))
        trained_on = next(path for path in sorted(Path("web").iterdir()) if not is_validation(str(path), 0.2))
        before, _ = prepare()
        held_out.write_text(trained_on.read_text())
        data, lines = prepare()
        assert lines[0] == "1 held-out documents left out, since another source trains on the same text"
        assert data.validation.num_documents == before.validation.num_documents - 1
        assert data.train.num_documents == before.train.num_documents

    def test_messages_name_the_source(self):
        Path("code", "bad.txt").write_bytes(b"\xff")
        with pytest.raises(DataError, match=r"^data\.sources, code: code/bad\.txt: not UTF-8 at byte 0"):
            prepare()
        Path("code", "bad.txt").unlink()
        with pytest.raises(DataError, match=r"^data\.sources, \w+: the training text is too short"):
            prepare(sequence_length=10_000)

    def test_commands(self):
        text = (
            "data: {sources: [{name: web, weight: 3, source: {name: files, paths: [web]}}, {name: code, source: "
            "{name: files, paths: [code]}}], tokenizer: {name: bpe, vocab_size: 300}, sequence_length: 16, "
            "cache_dir: cache}\n"
        )
        Path("config.yaml").write_text(text)

        def lines(*command):
            done = CliRunner().invoke(app, ["data", *command, "config.yaml"])
            assert (done.exit_code, done.exception) == (0, None)
            return done.stdout.splitlines()

        before = lines("show")
        assert before[0] == "source      web: 3,072 of every 4,096 sequences"
        assert sum(line.endswith("; not ingested") for line in before) == 4
        after = lines("ingest")
        assert after[-len(lines("show")) :] == lines("show")
        assert sum("1 shard of 2 bytes per token, vocabulary of" in line for line in after) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0}, "data.sources[0].weight: is out of range (got 0); expected a number above 0"),
        ({"weight": 1e-6}, "data.sources: has a weight of less than 1/4,096 of the sum"),
        ({"name": "code"}, "data.sources: has two sources of one name"),
        ({"wieght": 1}, "data.sources[0].wieght: unknown key"),
        ({"source": {"name": "digits"}}, "data.sources[0].source.name: is not a choice (got digits)"),
        ({"source": {"name": "files", "pahts": ["a"], "paths": ["a"]}}, "data.sources[0].source.pahts: unknown key"),
        ({"source": {"name": "files", "paths": ["a"], "encoding": "x"}}, "data.sources: has a source with an encoding"),
        ({"source": None}, "data.sources[0].source"),
    ],
)
def test_faults_of_a_config_are_named(change, message):
    config = values()
    config["data"]["sources"][0] |= change
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_from_dict(config)


def test_one_source_or_several():
    with pytest.raises(ConfigError, match=r"^data\.sources: mixes several sources, and data\.source is given too"):
        config_from_dict(values(source={"name": "files", "paths": ["a"]}))
    assert config_from_dict(values()).data.tokenizer == ByteTokenizer()
    assert isinstance(config_from_dict({}).data.tokenizer, BPETokenizer)
