"""The table of docs/routers.md: how coefficients of load-balancing losses carry over from other frameworks."""

from pathlib import Path

import numpy as np
import pytest

from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.config import config_from_dict
from moeport.conformance import formulas
from moeport.core.losses import load_balance_loss
from moeport.core.routing import RouterContext, Routing
from moeport.errors import ConfigError
from moeport.routers import build_router
from moeport.routers.gshard import GShardConfig
from moeport.routers.sigmoid_bias import SigmoidBiasConfig
from moeport.routers.topk import TopKConfig
from tests.support import assert_close, rng

EXPERTS, TOKENS, COEFFICIENT = 8, 24, 0.02
DOCS = Path(__file__).parents[2] / "docs" / "routers.md"


def logits(seed=1):
    """Of one layer, skewed to the later experts."""
    return rng(seed).standard_normal((TOKENS, EXPERTS)) + np.linspace(-1, 1, EXPERTS)


def ours(config, logits_TE, sequences=1):
    """The unweighted loss of a layer."""
    params = {"weight": np.eye(EXPERTS), "bias": np.zeros(EXPERTS)}
    routing = build_router(config, EXPERTS, EXPERTS).route(NumpyOps(), params, logits_TE, RouterContext(0, False))
    assert isinstance(routing, Routing)
    return float(np.asarray(load_balance_loss(NumpyOps(), routing, sequences)))


def softmax(logits_TE):
    return np.array([formulas.softmax(row) for row in logits_TE])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_transformers(top_k, layers):
    """c K / L, exactly where the layers have the same f and P, as theirs is the product of means over the layers."""
    torch, mixtral = pytest.importorskip("torch"), pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    theirs = mixtral.load_balancing_loss_func((torch.tensor(logits()),) * layers, EXPERTS, top_k)
    loss = COEFFICIENT * float(theirs)
    converted = COEFFICIENT * top_k / layers
    assert_close(sum(converted * ours(TopKConfig(top_k=top_k), logits()) for _ in range(layers)), loss, 1e-6)


def test_transformers_joins_the_layers():
    torch, mixtral = pytest.importorskip("torch"), pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    different = [logits(seed) * sign for seed, sign in ((1, 1), (2, -1))]
    theirs = float(mixtral.load_balancing_loss_func(tuple(map(torch.tensor, different)), EXPERTS, 2))
    apart = sum(2 / 2 * ours(TopKConfig(), logits_TE) for logits_TE in different)
    assert apart > 1.05 * theirs  # unevenness that one layer makes up for in another costs nothing there


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_megatron(top_k):
    """Its formula in its own terms: sums of probabilities and counts, times E c / (T^2 K)."""
    probs_TE = softmax(logits())
    counts_E = np.bincount(np.argsort(-probs_TE, axis=1)[:, :top_k].reshape(-1), minlength=EXPERTS)
    theirs = (probs_TE.sum(axis=0) * counts_E).sum() * EXPERTS * COEFFICIENT / (TOKENS**2 * top_k)
    assert_close(COEFFICIENT * ours(TopKConfig(top_k=top_k), logits()), theirs, 1e-13)


def test_gshard():
    """Algorithm 1 prints 1 / E * sum over e of c_e / S * m_e, c_e first choices; released codes multiply it by E^2."""
    probs_SE = softmax(logits())
    first = probs_SE.argmax(axis=1)
    printed = sum((first == e).sum() / TOKENS * probs_SE[:, e].mean() for e in range(EXPERTS)) / EXPERTS
    converted = COEFFICIENT / EXPERTS**2
    assert_close(converted * ours(GShardConfig(random_second=False), logits()), COEFFICIENT * printed, 1e-13)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_deepseek_v2(top_k):
    """The expert-level balance loss: f_i = N / (K T) times a count, P_i the mean of softmax scores, per sequence."""
    sequences, pieces = 3, []
    for probs_TE in softmax(logits()).reshape(sequences, -1, EXPERTS):
        chosen = np.argsort(-probs_TE, axis=1)[:, :top_k]
        f_E = np.array([EXPERTS / (top_k * len(probs_TE)) * (chosen == e).sum() for e in range(EXPERTS)])
        pieces.append(COEFFICIENT * (f_E * probs_TE.mean(axis=0)).sum())
    config = TopKConfig(top_k=top_k, normalize_gates=False)
    assert_close(COEFFICIENT * ours(config, logits(), sequences), np.mean(pieces), 1e-13)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_deepseek_v3(top_k):
    """Equations 17 to 20, where the scores are sigmoids over their sum."""
    sequences, pieces = 3, []
    for z_TE in logits().reshape(sequences, -1, EXPERTS):
        scores_TE = 1 / (1 + np.exp(-z_TE))
        share_TE = scores_TE / scores_TE.sum(axis=1, keepdims=True)
        chosen = np.argsort(-scores_TE, axis=1)[:, :top_k]
        f_E = np.array([EXPERTS / (top_k * len(z_TE)) * (chosen == e).sum() for e in range(EXPERTS)])
        pieces.append(COEFFICIENT * (f_E * share_TE.mean(axis=0)).sum())
    got = COEFFICIENT * ours(SigmoidBiasConfig(top_k=top_k), logits(), sequences)
    assert_close(got, np.mean(pieces), 1e-13)


@pytest.mark.parametrize(
    ("key", "factor"),
    [
        ("router_aux_loss_coef", "transformers': multiply its value by top_k / number of layers with experts"),
        ("moe_aux_loss_coeff", "Megatron's: its value carries over"),
        ("aux_loss_alpha", "DeepSeek's: its value carries over, with scope sequence"),
    ],
)
def test_the_hint_for_their_key_says_the_factor(key, factor):
    with pytest.raises(ConfigError) as error:
        config_from_dict({"model": {"moe": {key: 0.02}}})
    assert str(error.value).endswith(
        f"model.moe.{key}: unknown key ({factor}); did you mean model.moe.load_balance.coefficient?"
    )
    assert f"`{key}`" in DOCS.read_text()
