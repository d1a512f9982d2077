import re

import pytest
from rich.console import Console

from moeport.config.training import BackendConfig
from moeport.errors import CheckpointError, UserError
from moeport.training.generate import config_of, find_checkpoint, generate
from moeport.training.run import train
from tests.training.tiny import LINES, tiny_config
from tests.training.whole import load_checkpoint


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    config = tiny_config(
        folder,
        model={"d_model": 32, "init_std": 0.1},
        training={"steps": 250, "batch_size": 8, "evaluation_interval": 0},
        data={"sequence_length": 64},
        optimizer={"learning_rate": 0.02},
        checkpoint={"interval": 100},
    )
    train(config, console=Console(quiet=True))
    return config.run.dir


def test_the_most_likely_text_looks_like_what_was_learned(run_dir):
    text = generate(run_dir, "def f7(x):\n", temperature=0, max_tokens=11)
    assert text == "    return "
    assert f"def f7(x):\n{text}" in LINES[7]


def test_equal_seeds_give_equal_text_and_others_differ(run_dir):
    texts = [generate(run_dir, "def ", seed=seed, temperature=1.5, max_tokens=30) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_top_k_one_is_the_most_likely_token(run_dir):
    greedy = generate(run_dir, "d", temperature=0, max_tokens=10)
    assert generate(run_dir, "d", temperature=1.0, top_k=1, max_tokens=10) == greedy


def test_longer_than_the_context_and_an_empty_prompt(run_dir):
    assert len(generate(run_dir, "", max_tokens=100, temperature=1.0)) > 0


def test_a_run_of_another_device_continues_text_here(run_dir, monkeypatch):
    """Also with operators by name that this device lacks."""
    here = generate(run_dir, "d", temperature=0, max_tokens=5)
    backend = BackendConfig(device="npu", kernels={"swiglu": "npu_swiglu"})
    elsewhere = config_of(load_checkpoint(find_checkpoint(run_dir / "checkpoints", "latest"))).model_copy(
        update={"backend": backend}
    )
    monkeypatch.setattr("moeport.training.generate.config_of", lambda loaded: elsewhere)
    assert generate(run_dir, "d", temperature=0, max_tokens=5) == here


def test_any_checkpoint_can_be_named(run_dir):
    assert generate(run_dir, "d", max_tokens=3, checkpoint="step-200")
    with pytest.raises(CheckpointError, match="there is no checkpoint step-9"):
        generate(run_dir, "d", checkpoint="step-9")


@pytest.mark.parametrize("router", ["expert_choice", "sparsity_constrained_expert_choice", "soft"])
def test_routers_that_look_ahead_begin_with_texts_shorter_than_the_experts_are_many(tmp_path, router):
    """What was said is routed anew for each token: the experts then choose among one more."""
    moe = {"num_experts": 8, "expert_hidden": 8, "router": {"name": router}, "allow_future_tokens": True}
    config = tiny_config(
        tmp_path, model={"moe": moe}, training={"steps": 2, "evaluation_interval": 0}, checkpoint={"interval": 2}
    )
    train(config, console=Console(quiet=True))
    assert generate(config.run.dir, "", temperature=0, max_tokens=12)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"not a run folder: it has no config\.yaml"):
        generate(tmp_path, "d")


def test_impossible_options_are_refused(run_dir):
    with pytest.raises(UserError, match=r"temperature must be at least 0, top_k and max_tokens at least 1"):
        generate(run_dir, "d", temperature=-1)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [("ab\udcff", "the byte 0xff stands after 2 characters"), ("\ud800", "half of a pair, U+D800 stands after 0")],
)
def test_a_prompt_that_is_no_text(run_dir, prompt, found):
    with pytest.raises(UserError, match=f"^prompt: is not text: {re.escape(found)}.*; expected text in UTF-8$"):
        generate(run_dir, prompt)


@pytest.mark.parametrize("prompt", ["\0", "   ", "<|endoftext|>", "x" * 300, "\x1b[31m\u202e"])
def test_odd_prompts_are_text(run_dir, prompt):
    assert isinstance(generate(run_dir, prompt, max_tokens=2, temperature=1.0), str)
