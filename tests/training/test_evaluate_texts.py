"""Loss, bits per byte and perplexity on texts."""

import json
import math

import numpy as np
import pytest
from rich.console import Console

import moeport
from moeport.backends import get_backend
from moeport.config.model import CapacityConfig, ModelConfig, MoEConfig
from moeport.config.training import BackendConfig
from moeport.core.parameters import initial_parameters
from moeport.data.tokenizer import ByteTokenizer
from moeport.errors import UserError
from moeport.model.decoder import DecoderLM
from moeport.training.evaluate_texts import evaluate_texts
from moeport.training.run import train
from tests.training.tiny import tiny_config

TOKENIZER = ByteTokenizer()


def model_of(moe=None):
    config = ModelConfig(
        num_layers=1, d_model=16, init_std=0.3, moe=MoEConfig(num_experts=4, expert_hidden=8, **moe or {})
    )
    lm = DecoderLM(config, TOKENIZER.vocab_size)
    backend = get_backend(BackendConfig(name="numpy", dtype="float64"))
    return backend.evaluation_model(lm, initial_parameters(lm.parameter_specs(), 0))


def nats_of(model, text, context, stride):
    """Token by token: each is scored in the first window that predicts it."""
    ids = [TOKENIZER.end_of_text, *text.encode(), TOKENIZER.end_of_text]
    nats, done = [], 1
    for start in range(0, len(ids), stride):
        window = ids[start : start + context]
        scores = model.logits(np.array([window]))[0]
        for place, target in enumerate(ids[start + 1 : start + 1 + context]):
            if start + 1 + place >= done:
                nats.append(np.log(np.exp(scores[place]).sum()) - scores[place, target])
                done += 1
    assert done == len(ids)
    return nats


@pytest.fixture
def texts(tmp_path):
    found = {"a.txt": "héllo world, " * 3, "b.txt": "xy", "c.jsonl": ""}
    for name, text in found.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    rows = ["a row", "", "another"]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return {str(tmp_path / "a.txt"): [found["a.txt"]], str(tmp_path / "b.txt"): ["xy"], str(tmp_path / "c.jsonl"): rows}


@pytest.mark.parametrize(("context", "stride"), [(8, None), (8, 3), (8, 8), (100, None), (8, 1), (1, None)])
def test_each_token_counts_once_in_the_first_window_that_predicts_it(texts, context, stride, monkeypatch):
    monkeypatch.setattr("moeport.training.evaluate_texts.SCORES", 2 * TOKENIZER.vocab_size)
    model = model_of()
    found = evaluate_texts(model, TOKENIZER, list(texts), context, stride, batch_size=2)
    for path, documents in texts.items():
        documents = [text for text in documents if text]
        nats = [nat for text in documents for nat in nats_of(model, text, context, stride or context)]
        got = found.files[path]
        assert (got.documents, got.tokens) == (len(documents), len(nats))
        assert got.num_bytes == sum(len(text.encode()) for text in documents)
        assert got.loss == pytest.approx(np.mean(nats), rel=1e-12)
        assert got.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / got.num_bytes, rel=1e-12)
        assert got.perplexity == pytest.approx(math.exp(np.mean(nats)), rel=1e-12)
    total = found.total
    assert total.tokens == sum(each.tokens for each in found.files.values())
    assert total.nats == pytest.approx(sum(each.nats for each in found.files.values()), rel=1e-12)


def test_windows_stand_by_themselves_where_experts_have_a_capacity(texts):
    """A batch of several would drop other tokens."""
    model = model_of({"capacity": CapacityConfig(policy="factor", factor=0.5)})
    one, several = (evaluate_texts(model, TOKENIZER, list(texts), 8, None, batch_size) for batch_size in (1, 6))
    assert one == several


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 9}, r"the stride must be at least 1 and at most the context of 8 tokens \(got 9\)"),
        ({"paths": ["no/such.txt"]}, "^--text: no file matches 'no/such.txt'"),
    ],
)
def test_what_cannot_be_evaluated(texts, options, message):
    arguments = {"paths": list(texts), "context": 8} | options
    with pytest.raises(UserError, match=message):
        evaluate_texts(model_of(), TOKENIZER, **arguments)


@pytest.mark.parametrize("stride", [8, 3])
def test_a_loss_that_is_no_number(texts, stride):
    model = model_of()
    model.load_parameters({"final_norm.weight": np.full(16, np.nan)})
    with pytest.raises(UserError, match=r"a\.txt: the loss is nan; expected a finite number"):
        evaluate_texts(model, TOKENIZER, list(texts), 8, stride)


def test_files_without_text(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"^--text: there is no text in .*empty\.txt$"):
        evaluate_texts(model_of(), TOKENIZER, [str(tmp_path / "empty.txt")], 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("eval"), training={"steps": 3, "evaluation_interval": 0})
    return config, train(config, console=Console(quiet=True))


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_it_is_the_validation_loss_of_a_run_whose_held_out_text_is_the_file(run, backend):
    config, summary = run
    found = moeport.evaluate(config.run.dir, [config.data.source.validation_paths[0]], backend=backend)
    assert found.total.loss == pytest.approx(summary.val_loss, rel=1e-6)
    assert found.total.bits_per_byte == pytest.approx(summary.val_bits_per_byte, rel=1e-6)
    assert (found.context, found.stride) == (32, 32)
