"""A layer on a device whose tensors hold nothing, so that nobody can read them: shapes and types only.

It takes the way of CUDA. Whatever would make the host wait for a device (a number, a list or a size that depends on
data) raises an error. Forward and backward.
"""

from typing import Any

import pytest

from moeport.config.model import MoELayerConfig
from moeport.model.moe import MoELayer
from tests.routers.catalogue import EXAMPLES
from tests.routers.examples import TOKEN_COUNTS, label

torch: Any = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from moeport.backends.torch import sorting  # noqa: E402
from moeport.backends.torch.ops import DTYPES, TorchOps  # noqa: E402
from moeport.core.routing import RouterContext  # noqa: E402

WIDTH, HIDDEN, EXPERTS, TOKENS, SEQUENCES = 160, 8, 40, 64, 4
CAPACITIES = {
    "dropless": {},
    "by position": {"policy": "factor"},
    "by gate": {"policy": "factor", "drop": "probability"},
    "at random": {"policy": "factor", "drop": "random"},
    "estimated": {"policy": "locmoe_plus", "delta": "quantile"},
}
"""Those that fill no rows."""


class Largest(TorchDispatchMode):
    """Remembers the result with the most elements."""

    def __init__(self):
        super().__init__()
        self.elements, self.operation = 0, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.numel() > self.elements:
                self.elements, self.operation = x.numel(), function
        return out


class DeviceOps(TorchOps):
    """As on a GPU that has grouped products."""

    def uses_grouped_mm(self, x):
        return True


@pytest.fixture(autouse=True)
def keyed(monkeypatch):
    monkeypatch.setattr(sorting, "KEYED", ("cpu", "cuda", "meta"))


def there_and_back(config):
    """The layer's metrics, and the largest result on the way."""
    layer = MoELayer(config, WIDTH, 0.02, 0.01, vocab_size=len(TOKEN_COUNTS))
    with torch.device("meta"), Largest() as largest:
        ops = DeviceOps(torch.device("meta"))
        params = {
            spec.name: torch.empty(spec.shape, requires_grad=spec.trainable and not spec.is_table)
            for spec in layer.parameter_specs()
        }
        noise = {name: torch.empty(TOKENS) for name in layer.noise}
        ids_T = torch.empty(TOKENS, dtype=torch.long)
        x_TD: Any = torch.empty(TOKENS, WIDTH, dtype=DTYPES["bfloat16"], requires_grad=True)
        y_TD: Any
        context: Any = RouterContext(0, True, ids_T, noise, SEQUENCES)
        y_TD, metrics = layer.forward(ops, params, x_TD, context)
        assert (y_TD.dtype, y_TD.shape) == (x_TD.dtype, x_TD.shape)
        (y_TD.float().sum() + layer.auxiliary_loss(ops, metrics)).backward()
    assert x_TD.grad.shape == x_TD.shape
    return metrics, largest


def config_of(router, **more):
    return MoELayerConfig.model_validate(
        {"num_experts": EXPERTS, "expert_hidden": HIDDEN, "router": router, "router_z_loss": 0.1, **more}
    )


ROUTERS = [config for configs in EXAMPLES.values() for config in configs if not config.problems(EXPERTS)]


@pytest.mark.parametrize("router", ROUTERS, ids=label)
def test_no_router_makes_the_host_wait(router):
    for kind in ("float32", "compute"):
        there_and_back(config_of(router, router_dtype=kind))


@pytest.mark.parametrize("capacity", CAPACITIES.values(), ids=CAPACITIES)
@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_no_capacity_makes_the_host_wait_and_nothing_is_as_large_as_assignments_times_experts(capacity, scope):
    """The largest are the tokens of the rows and the scores of all experts."""
    config = config_of({"name": "topk", "top_k": 4}, capacity=capacity, load_balance={"scope": scope})
    metrics, largest = there_and_back(config)
    weights = EXPERTS * 2 * HIDDEN * WIDTH
    assert largest.elements == max(TOKENS * 4 * WIDTH, weights), largest.operation
    assert (metrics.capacity is None) == (not capacity)


def test_the_share_on_the_own_node_does_not_make_the_host_wait():
    metrics, _ = there_and_back(config_of({"name": "topk", "top_k": 4, "nodes": 2}))
    assert metrics.measured["local_share"].shape == ()


def test_rounding_does_not_make_the_host_wait():
    """Nor does it make anything larger than its rows, of which each expert may fill half a tile."""
    config = config_of({"name": "topk", "top_k": 4}, capacity={"policy": "round", "tile": 8})
    metrics, largest = there_and_back(config)
    weights = EXPERTS * 2 * HIDDEN * WIDTH
    assert largest.elements == max((TOKENS * 4 + EXPERTS * 4) * WIDTH, weights), largest.operation
    assert metrics.measured["fill_rate"].shape == ()


def test_the_shares_of_the_load_balancing_loss_take_no_one_hot_vectors():
    """Without the experts, whose rows are larger: nothing has more elements than the scores or the assignments."""
    from moeport.core.losses import load_balance_loss
    from moeport.core.routing import Routing

    tokens, choices = 512, 8
    ops = TorchOps(torch.device("meta"))
    for sequences in (1, SEQUENCES):
        with torch.device("meta"), Largest() as largest:
            probs_TE: Any = torch.empty(tokens, EXPERTS)
            expert_N: Any = torch.empty(tokens * choices, dtype=torch.long)
            load_balance_loss(ops, Routing(expert_N, expert_N, tokens, EXPERTS, probs_TE, probs_TE, choices), sequences)
        assert largest.elements == tokens * max(EXPERTS, choices), largest.operation


@pytest.mark.parametrize("read", [lambda x: x.tolist(), lambda x: x.sum().item(), lambda x: x.nonzero(), bool])
def test_waiting_would_be_noticed(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.empty(1, device="meta"))
