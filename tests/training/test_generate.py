import re

import numpy as np
import pytest
from rich.console import Console

from moeport.config.training import BackendConfig
from moeport.errors import CheckpointError, UserError
from moeport.training.checkpoint import find_checkpoint
from moeport.training.continued import Generated
from moeport.training.generate import generate, generate_texts
from moeport.training.run import train
from moeport.training.run_dir import config_of
from moeport.training.sampling import Sampling, draw
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
    monkeypatch.setattr("moeport.training.trained.config_of", lambda loaded: elsewhere)
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
    with pytest.raises(UserError, match=r"temperature must be at least 0 and finite, top_k and max_tokens at least 1"):
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


PROMPTS = ["def f3(x):\n", "", "d", "def f7(x):\n    return x * 7" * 4]


def test_a_batch_gives_what_each_prompt_gives_by_itself(run_dir):
    """Also where texts end at different steps, and where one is longer than the context."""
    sampling = Sampling(max_tokens=90, temperature=1.2, top_p=0.95, stop=("return",))
    together = list(generate_texts(run_dir, PROMPTS, sampling, seeds=[5, 6, 7, 8], batch_size=3))
    alone = []
    for prompt, seed in zip(PROMPTS, (5, 6, 7, 8), strict=True):
        alone += generate_texts(run_dir, [prompt], sampling, seeds=[seed])
    assert together == alone
    assert len({text.tokens for text in together}) > 1


def test_a_prompt_and_several_seeds_are_several_texts(run_dir):
    sampling = Sampling(max_tokens=9, temperature=1.5)
    texts = list(generate_texts(run_dir, ["def "], sampling, seeds=[1, 2, 1]))
    assert [text.seed for text in texts] == [1, 2, 1]
    assert texts[0] == texts[2] != texts[1]
    assert texts[0].text == generate(run_dir, "def ", max_tokens=9, temperature=1.5, seed=1)
    with pytest.raises(UserError, match=r"^there are 2 prompts and 3 seeds; expected one seed, or one for each"):
        generate_texts(run_dir, ["a", "b"], seeds=[1, 2, 3])


def test_a_text_ends_before_a_stop_string(run_dir):
    """The tokens are bytes, so that each string spans several."""
    whole = generate(run_dir, "def f7(x):\n", temperature=0, max_tokens=40)
    sampling = Sampling(max_tokens=40, temperature=0.0, stop=("zzz", "turn", "return"))
    pieces = []
    text = next(generate_texts(run_dir, ["def f7(x):\n"], sampling, on_text=pieces.append))
    assert text == Generated("def f7(x):\n", "    ", 0, len("    return"), "stop")
    assert whole.startswith("    return")
    assert "".join(pieces) == text.text


def test_a_stop_string_that_never_ends_is_shown_in_the_end(run_dir):
    sampling = Sampling(max_tokens=8, temperature=0.0, stop=("    retX",))
    pieces = []
    text = next(generate_texts(run_dir, ["def f7(x):\n"], sampling, on_text=pieces.append))
    assert (text.text, text.finish, "".join(pieces)) == ("    retu", "length", "    retu")


def test_the_finish_of_a_text_that_the_model_ends(run_dir):
    texts = list(generate_texts(run_dir, [""], Sampling(max_tokens=300, temperature=3.0, top_k=257), seeds=[*range(5)]))
    ended = [text for text in texts if text.finish == "end_of_text"]
    assert ended
    assert all(text.tokens < 300 for text in ended)


class TestDraw:
    LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3]))

    def drawn(self, **options):
        random = np.random.default_rng(0)
        return {draw(self.LOGITS, Sampling(temperature=1.0, **options), random) for _ in range(400)}

    @pytest.mark.parametrize(("top_p", "kept"), [(0.3, {1}), (0.41, {1, 3}), (0.75, {1, 2, 3}), (1.0, {0, 1, 2, 3})])
    def test_top_p_keeps_the_fewest_that_sum_to_it(self, top_p, kept):
        assert self.drawn(top_p=top_p) == kept

    def test_top_p_is_of_what_top_k_leaves(self):
        """Of 0.4 and 0.3, the first has 0.57."""
        assert self.drawn(top_k=2, top_p=0.5) == {1}
        assert self.drawn(top_k=2, top_p=0.6) == {1, 3}

    def test_of_equal_scores_the_lower_id_comes_first(self):
        logits = np.array([1.0, 2.0, 2.0, 2.0, 0.0])
        assert draw(logits, Sampling(temperature=0.0, top_k=2), np.random.default_rng(0)) == 1
        assert {draw(logits, Sampling(top_k=2), np.random.default_rng(seed)) for seed in range(40)} == {1, 2}

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_scores_that_are_not_finite_are_no_text(self, bad, temperature):
        logits = np.array([1.0, bad, 2.0, -np.inf])
        with pytest.raises(UserError, match=f"^the model's scores of the next token are not finite .*{bad}"):
            draw(logits, Sampling(temperature=temperature, top_k=2), np.random.default_rng(0))
        assert draw(np.array([1.0, -np.inf]), Sampling(), np.random.default_rng(0)) == 0

    @pytest.mark.filterwarnings("error")
    def test_the_lowest_temperatures_take_the_most_likely(self):
        assert {draw(self.LOGITS, Sampling(temperature=5e-324), np.random.default_rng(seed)) for seed in range(9)} == {
            1
        }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, r"temperature must be at least 0 and finite, .* \(got nan, 50, 200\)"),
        ({"temperature": float("inf")}, r"temperature must be at least 0 and finite, .* \(got inf, 50, 200\)"),
        ({"top_p": 0.0}, r"top_p must be above 0 and at most 1 \(got 0.0\)"),
        ({"top_p": 1.5}, r"top_p must be above 0 and at most 1 \(got 1.5\)"),
        ({"stop": ("",)}, "stop: is empty, and every text would end at once; expected at least one character"),
    ],
)
def test_other_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        Sampling(**options)
