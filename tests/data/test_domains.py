"""Text of several domains, dealt to nodes."""

import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moeport.cli.main import app
from moeport.config import config_from_dict
from moeport.data import Dealing, DomainTokens, MixedTokens, prepare_data
from moeport.data.documents import is_validation
from moeport.data.tokenizer import train_bpe
from moeport.errors import ConfigError, DataError

NAMES = ("python", "c", "rust")
FOLDERS = ("a", "b", "x", "y")


def files(folder):
    return {"name": "files", "paths": [folder]}


def domains():
    return [
        {"name": "a", "source": files("a")},
        {
            "name": "mixed",
            "sources": [{"name": "x", "weight": 3, "source": files("x")}, {"name": "y", "source": files("y")}],
        },
        {"name": "b", "source": files("b")},
    ]


def values(**options):
    data = {"domains": domains(), "tokenizer": {"name": "byte"}, "sequence_length": 16, "cache_dir": "cache"}
    return {"data": {**data, "validation_fraction": 0.2, **options}}


def prepare(**options):
    lines = []
    return prepare_data(config_from_dict(values(**options)).data, report=lines.append), lines


@pytest.fixture
def _texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, folder in enumerate(FOLDERS):
        Path(folder).mkdir()
        for i in range(12):
            Path(folder, f"{i}.txt").write_text(f"{folder} {i}: " + f"text {i} of {folder}, " * (6 + 3 * number))


class TestDealing:
    @pytest.mark.parametrize(("nodes", "ranks"), [(1, 1), (2, 1), (2, 2), (4, 1), (6, 2), (5, 1)])
    def test_the_sequences_of_a_rank_are_of_its_node_and_its_domain(self, nodes, ranks):
        of_rank = np.repeat(np.arange(nodes), ranks)
        dealing = Dealing.of(NAMES, 60, of_rank.tolist(), 1, None)
        for rank, node in enumerate(of_rank):
            own = slice(60 * rank // len(of_rank), 60 * (rank + 1) // len(of_rank))
            assert set(dealing.node_B[own]) == {node}
            assert set(dealing.domain_B[own]) == {node % 3}
        assert dealing.counts == {name: int((dealing.domain_B == d).sum()) for d, name in enumerate(NAMES)}

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_any_number_of_ranks_of_the_same_nodes_deals_alike(self, ranks):
        one, more = (Dealing.of(NAMES, 24, np.repeat([0, 1], each).tolist(), 2, None) for each in (1, ranks))
        simulated = Dealing.of(NAMES, 24, [0], 1, 2)
        for other in (more, simulated):
            np.testing.assert_array_equal(other.domain_B, one.domain_B)

    def test_simulated_nodes_divide_each_micro_batch(self):
        dealing = Dealing.of(NAMES, 24, [0, 0], 2, 3)
        np.testing.assert_array_equal(dealing.node_B, np.tile(np.repeat([0, 1, 2], 2), 4))
        assert dealing.counts == dict.fromkeys(NAMES, 8)

    def test_uneven_and_numbered_nodes(self):
        dealing = Dealing.of(NAMES, 12, [7, 7, 3], 1, None)
        assert dealing.counts == {"python": 8, "c": 4, "rust": 0}

    def test_it_says_what_each_domain_gives_and_what_is_never_trained_on(self):
        (line,) = Dealing.of(NAMES, 8, [0, 1, 2, 3], 1, None).described()
        assert line == (
            "domains     python 50.0% of the sequences (nodes 0, 3); c 25.0% of the sequences (node 1); "
            "rust 25.0% of the sequences (node 2)"
        )
        _, warning = Dealing.of(NAMES, 8, [0], 1, None).described()
        assert warning == (
            "warning: data.domains: no node trains on c, rust: node n trains on domain n modulo 3, and there is one "
            "node; start more nodes, or simulate them with model.moe.router.nodes"
        )


@pytest.mark.usefixtures("_texts")
class TestPrepared:
    def test_a_step_draws_from_each_domain_what_a_run_on_it_alone_draws(self):
        data, _ = prepare()
        train = data.train
        assert isinstance(train, DomainTokens)
        assert [type(part) is MixedTokens for part in train.parts.values()] == [False, True, False]
        dealing = Dealing.of([*train.parts], 12, [0, 1, 2, 0], 1, None)
        sampler = train.dealt(dealing, seed=3)
        starts = np.cumsum([0, *(part.num_sequences for part in train.parts.values())])
        for step in (0, 40, 7):
            index_B = sampler.indices(step)
            for domain, part in enumerate(train.parts.values()):
                own_B = index_B[dealing.domain_B == domain]
                assert ((starts[domain] <= own_B) & (own_B < starts[domain + 1])).all()
                tokens_BS, _ = train.batch(own_B)
                np.testing.assert_array_equal(tokens_BS, part.batch(own_B - starts[domain])[0])
            np.testing.assert_array_equal(index_B[:3], sampler.rank_indices(step, 0, 4))
            np.testing.assert_array_equal(index_B, train.dealt(dealing, seed=3).indices(step))
        mixture = train.parts["mixed"]
        drawn = [sampler.indices(step)[3:6] - starts[1] for step in range(5)]
        np.testing.assert_array_equal(drawn, [mixture.sampler(3, 3).indices(step) for step in range(5)])

    def test_every_epoch_of_a_domain_has_all_its_sequences_in_an_order_of_its_own(self):
        train = prepare()[0].train
        size = train.parts["a"].num_sequences
        sampler = train.dealt(Dealing.of([*train.parts], 2, [0, 2], 1, None), seed=0)
        drawn = np.array([sampler.indices(step) for step in range(2 * size)])
        first, second = drawn[:size, 0], drawn[size:, 0]
        assert sorted(first) == sorted(second) == list(range(size))
        assert first.tolist() != second.tolist()

    def test_nodes_change_neither_the_fingerprint_nor_the_counts_of_ids(self):
        train = prepare()[0].train
        shares = [part.token_counts() / part.num_tokens for part in train.parts.values()]
        np.testing.assert_allclose(train.token_counts(), np.mean(shares, axis=0) * train.num_tokens, atol=1)
        renamed = domains()
        renamed[0]["name"] = "z"
        assert prepare(domains=renamed)[0].train.fingerprint != train.fingerprint

    def test_each_domain_holds_its_own_documents_out(self):
        held_out = prepare()[0].validation
        targets = dict.fromkeys(range(3), 0)
        for domain, (_, target_BS) in held_out.windows_by_domain(4):
            targets[domain] += target_BS.size
        wanted = [held_out.parts["a"], *held_out.parts["mixed"].parts.values(), held_out.parts["b"]]
        a, x, y, b = (part.num_tokens - 1 for part in wanted)
        assert targets == {0: a, 1: x + y, 2: b}

    def test_one_tokenizer_is_trained_on_all_domains(self):
        data, _ = prepare(tokenizer={"name": "bpe", "vocab_size": 300})
        paths = [path for name in ("a", "x", "y", "b") for path in sorted(Path(name).iterdir())]
        texts = [path.read_text() for path in paths if not is_validation(str(path), 0.2)]
        assert data.tokenizer.fingerprint == train_bpe(texts, 300).fingerprint

    def test_messages_name_the_domain(self):
        Path("y", "bad.txt").write_bytes(b"\xff")
        with pytest.raises(DataError, match=r"^data\.domains, mixed/y: y/bad\.txt: not UTF-8 at byte 0"):
            prepare()
        Path("y", "bad.txt").unlink()
        for path in Path("b").iterdir():
            path.write_text("")
        with pytest.raises(DataError, match=r"^data\.domains, b: data\.source: there are no documents with text"):
            prepare()

    def test_commands_name_the_domains(self):
        Path("config.yaml").write_text(
            "data: {tokenizer: {name: byte}, sequence_length: 16, cache_dir: cache, validation_fraction: 0.2, domains: "
            "[{name: a, source: {name: files, paths: [a]}}, {name: m, sources: [{name: x, source: {name: files, paths: "
            "[x]}}, {name: y, source: {name: files, paths: [y]}}]}]}\n"
        )

        def lines(*command):
            done = CliRunner().invoke(app, [*command, "config.yaml"])
            assert (done.exit_code, done.exception) == (0, None)
            return done.stdout.splitlines()

        assert lines("config", "check")[-2:] == ["domain      a: nodes 0, 2, 4, ..", "domain      m: nodes 1, 3, 5, .."]
        before = lines("data", "show")
        assert before[0] == "domain      a: nodes 0, 2, 4, .."
        assert [line for line in before if line.startswith("source")] == [
            "source      m/x: 2,048 of every 4,096 sequences",
            "source      m/y: 2,048 of every 4,096 sequences",
        ]
        assert sum(line.endswith("; not ingested") for line in before) == 6
        assert sum("1 shard of 2 bytes per token" in line for line in lines("data", "ingest")) == 6


ONE = {"name": "a", "source": files("a")}
TWO = [ONE, {**ONE, "name": "b"}]
BOTH = "data.domains: gives each domain its source, and data.source"


@pytest.mark.parametrize(
    ("data", "router", "message"),
    [
        ({"domains": [ONE, ONE]}, {}, "data.domains: has two domains of one name"),
        ({"domains": [{"name": "a"}]}, {}, "data.domains: has a domain without a source, or with both"),
        ({"domains": [{**ONE, "sources": [ONE]}]}, {}, "data.domains: has a domain without a source, or with both"),
        ({"domains": [{"name": "a/b", "source": files("a")}]}, {}, "data.domains[0].name: String should match"),
        ({"domains": [{**ONE, "surce": 1}]}, {}, "data.domains[0].surce: unknown key"),
        ({"domains": [{"name": "a", "source": {"name": "digits"}}]}, {}, "[0].source.name: is not a choice"),
        ({"domains": [{"name": "a", "sources": [ONE, ONE]}]}, {}, "data.domains: mixes two sources of one name"),
        ({"domains": [{**ONE, "source": {**files("a"), "encoding": "x"}}]}, {}, "data.domains: has a source with"),
        ({"domains": [ONE], "source": files("b")}, {}, BOTH),
        ({"domains": [ONE], "sources": [ONE]}, {}, BOTH),
        ({}, {"name": "rre", "groups": 2, "group_by": "domain"}, "data.domains names none"),
        (
            {"domains": TWO},
            {"name": "rre", "group_by": "domain"},
            "model.moe.router.groups: puts all 2 domains of data.domains in one group (got 1, the default)",
        ),
        (
            {"domains": TWO},
            {"name": "rre", "groups": 4, "group_by": "domain"},
            "model.moe.router.groups: leaves groups without any of the 2 domains in data.domains",
        ),
        (
            {"domains": TWO},
            {"name": "switch", "nodes": 3},
            "model.moe.router.nodes: do not divide the sequences of a micro-batch, 8 / 1",
        ),
    ],
)
def test_faults_of_a_config_are_named(data, router, message):
    model = {"model": {"moe": {"router": router}}} if router else {}
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_from_dict({"data": data, "training": {"batch_size": 8}, **model})


def test_a_whole_dump_is_accepted():
    config = config_from_dict(values())
    assert config_from_dict(config.model_dump(mode="json")).data.domains == config.data.domains
