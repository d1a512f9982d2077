"""The mixture-of-experts layer as an ordinary PyTorch module.

import moeport.torch
ffn = moeport.torch.MoE(d_model=512, num_experts=8, expert_hidden=1024, router="topk", router_options={"top_k": 2})
y = ffn(x)                                # x: (..., 512)
loss = loss + ffn.auxiliary_loss          # load balancing and router z-loss of this call
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from moeport.backends.torch.module import ParameterTree
from moeport.backends.torch.ops import TorchOps
from moeport.config import config_from_dict
from moeport.config.model import MoEConfig
from moeport.core.moe import MoELayer, MoEMetrics
from moeport.core.parameters import initial_parameters
from moeport.core.routing import RouterContext

__all__ = ["MoE"]


class MoE(ParameterTree):
    """A mixture-of-experts feed-forward block: use it where a model has its FFN.

    It has a state_dict, moves with `.to`, follows autocast, and may be compiled and recomputed. Router,
    capacity and losses are those of the `model.moe` section of the config; see `moeport routers` for the names.

    Args:
        d_model: width D of input and output.
        num_experts: routed experts E.
        expert_hidden: hidden width F of one expert.
        router: name of the router.
        router_options: the router's own options, such as `{"top_k": 2}`.
        capacity: name of the capacity policy, or the `model.moe.capacity` section such as
            `{"policy": "factor", "factor": 1.25, "drop": "probability"}`.
        activation: swiglu or gelu.
        num_shared_experts: experts that every token passes.
        routed_scaling_factor: multiplies the routed experts' output.
        load_balance: the `model.moe.load_balance` section; default the router's own coefficient.
        router_z_loss: weight of the router z-loss.
        init_std: standard deviation of initial weights.
        seed: of the initial weights; layers of one model need different ones.
        device: where the parameters are placed.
        dtype: type of the parameters.

    Raises:
        ConfigError: an option is unknown or out of range; the message names it.

    Attributes:
        auxiliary_loss: the weighted auxiliary losses of the last call, a scalar to add to the training loss.
        metrics: `MoEMetrics` of the last call: unweighted losses, assignments chosen and served for each expert.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        expert_hidden: int,
        *,
        router: str = "topk",
        router_options: Mapping[str, Any] | None = None,
        capacity: str | Mapping[str, Any] = "dropless",
        activation: Literal["swiglu", "gelu"] = "swiglu",
        num_shared_experts: int = 0,
        routed_scaling_factor: float = 1.0,
        load_balance: Mapping[str, Any] | None = None,
        router_z_loss: float = 0.0,
        init_std: float = 0.02,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        config = _config(
            d_model,
            num_experts=num_experts,
            expert_hidden=expert_hidden,
            router={"name": router, **(router_options or {})},
            capacity={"policy": capacity} if isinstance(capacity, str) else dict(capacity),
            activation=activation,
            num_shared_experts=num_shared_experts,
            routed_scaling_factor=routed_scaling_factor,
            **({} if load_balance is None else {"load_balance": dict(load_balance)}),
            router_z_loss=router_z_loss,
        )
        layer = MoELayer(config, d_model, init_std, init_std)
        specs = layer.parameter_specs()
        place = torch.device(device) if device is not None else torch.get_default_device()
        super().__init__(specs, initial_parameters(specs, seed), place, dtype)
        self.layer = layer
        self.auxiliary_loss: Tensor | None = None
        self.metrics: MoEMetrics | None = None

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., D); under autocast it is taken in the autocast type, else in its own.
            token_ids: vocabulary ids (...), for routers that look at them.

        Returns: the shape of `x`.
        """
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ops = TorchOps(x.device)
        x_TD = x.to(dtype).reshape(-1, x.shape[-1])
        noise = {}
        if self.training:
            noise = {name: torch.rand(x_TD.shape[0], device=x.device) for name in self.layer.router.noise}
        ids_T = token_ids.reshape(-1) if token_ids is not None else None
        context = RouterContext(layer=0, training=self.training, token_ids_T=ids_T, noise=noise)
        sequences = x_TD.shape[0] // x.shape[-2] if x.dim() > 2 else 1
        with torch.autocast(kind, enabled=False):
            y_TD, self.metrics = self.layer.forward(ops, self.arrays(), x_TD, context, num_sequences=sequences)
        self.auxiliary_loss = self.layer.auxiliary_loss(ops, self.metrics)
        return y_TD.reshape(x.shape)

    @torch.no_grad()
    def update_router_state(self) -> None:
        """After an optimiser step: let the router move what it balances by (the bias of `sigmoid_bias`).

        Uses the loads of the last call on this process; routers without such state do nothing.
        """
        if self.metrics is None:
            return
        prefix = "router."
        arrays = {name.removeprefix(prefix): x for name, x in self.arrays().items() if name.startswith(prefix)}
        names = {spec.name for spec in self.layer.router.parameter_specs() if not spec.trainable}
        state = {name: arrays[name].detach().float().cpu().numpy() for name in names}
        load_E = self.metrics.chosen_E.cpu().numpy()
        for name, value in self.layer.router.update_state(state, load_E).items():
            arrays[name].copy_(torch.from_numpy(value))

    def __getstate__(self) -> dict[str, Any]:
        # What the last call left is part of its graph, which can be neither copied nor pickled.
        return {**self.__dict__, "auxiliary_loss": None, "metrics": None}

    def extra_repr(self) -> str:
        """Shapes and router, for print(model)."""
        config = self.layer.config
        return (
            f"d_model={self.layer.d_model}, num_experts={config.num_experts}, expert_hidden={config.expert_hidden}, "
            f"router={config.router.name}, capacity={config.capacity.policy}"
        )


def _config(d_model: int, **options: Any) -> MoEConfig:
    """The checked section; head counts are those of any valid attention, since there is none here."""
    attention = {"num_heads": 1, "head_dim": 2}
    return config_from_dict({"model": {"d_model": d_model, "attention": attention, "moe": options}}).model.moe
