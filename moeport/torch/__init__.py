"""The mixture-of-experts layer as an ordinary PyTorch module, and the recording of any module for parity.

import moeport.torch
ffn = moeport.torch.MoE(d_model=512, num_experts=8, expert_hidden=1024, router="topk", router_options={"top_k": 2})
y = ffn(x)                                # x: (..., 512)
loss = loss + ffn.auxiliary_loss          # load balancing and router z-loss of this call

with moeport.torch.record(model, "bundles/mine") as recording:
    loss = model(x).square().mean()
    recording.add("loss", loss)
    loss.backward()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from moeport.backends.torch.module import ParameterTree
from moeport.backends.torch.ops import TorchOps
from moeport.core.parameters import initial_parameters
from moeport.core.routing import RouterContext
from moeport.errors import UserError
from moeport.model.moe import MoELayer
from moeport.torch.options import MoEOptions, layer_config
from moeport.torch.recording import ModuleRecording, record

__all__ = ["MoE", "MoEOptions", "ModuleRecording", "record"]


class MoE(ParameterTree):
    """A mixture-of-experts feed-forward block: use it where a model has its FFN.

    It has a state_dict, moves with `.to`, follows autocast, and may be compiled and recomputed. Router,
    capacity and losses are those of the `model.moe` section of the config; see `moeport routers` for the names.

    Args:
        d_model: width D of input and output.
        num_experts: routed experts E.
        expert_hidden: hidden width F of one expert.
        router_options: the router's own options, such as `{"top_k": 2}`.
        init_std: standard deviation of initial weights.
        vocab_size: number V of vocabulary ids, for routers that look at them.
        token_counts: how often each id occurs in the training set, from id 0 on, for routers that look at ids; missing
            ids count 0. Default: all equally often.
        seed: seed of the initial weights; give each layer of a model its own.
        device: device of the parameters.
        dtype: type of the parameters.
        **options: the other keys of `model.moe` for one layer, such as `router="switch"`,
            `capacity={"policy": "factor", "factor": 1.25}`, `activation="gelu"`, `num_shared_experts=1` or
            `load_balance={"coefficient": 0}`. `MoEOptions` lists them with types and meanings; defaults are those of
            the config. Router and capacity may be given by name or as a section. For `cartesian`, the module is one of
            its two sub-layers.

    Raises:
        ConfigError: an option is unknown or out of range; the message names it.
        UserError: the router looks at vocabulary ids, and vocab_size is missing or less than the token counts.

    Attributes:
        auxiliary_loss: the weighted auxiliary losses of the last call, a scalar to add to the training loss.
        metrics: `MoEMetrics` of the last call: unweighted losses, assignments chosen and served per expert.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        expert_hidden: int,
        *,
        router_options: Mapping[str, Any] | None = None,
        init_std: float = 0.02,
        vocab_size: int | None = None,
        token_counts: Sequence[int] | np.ndarray | Tensor | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        **options: Unpack[MoEOptions],
    ):
        given = {"num_experts": num_experts, "expert_hidden": expert_hidden, **options}
        config = layer_config(d_model, given, router_options or {}, _EXPLICIT)
        layer = MoELayer(config, d_model, init_std, init_std, vocab_size)
        specs = layer.parameter_specs()
        counts = None if token_counts is None else partial(_checked_counts, token_counts, vocab_size or 0)
        device = torch.device(device) if device is not None else torch.get_default_device()
        super().__init__(specs, initial_parameters(specs, seed, counts), device, dtype)
        self.layer = layer
        self.auxiliary_loss: Tensor | None = None
        self.metrics: Any = None

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., D); under autocast it is cast to the autocast type. The second-to-last dimension runs along a
                sequence, which matters for routers whose experts choose among the tokens of a sequence.
            token_ids: vocabulary ids (...), for routers that look at them.

        Returns: the shape of `x`.

        Raises UserError if the router looks at ids and gets none, or not one per token.
        """
        if self.layer.config.router.needs_token_ids:
            self._check(token_ids, x)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ops = TorchOps(x.device)
        x_TD = x.to(dtype).reshape(-1, x.shape[-1])
        noise = {}
        if self.training:
            noise = {name: torch.rand(x_TD.shape[0], device=x.device) for name in self.layer.noise}
        ids_T = token_ids.reshape(-1) if token_ids is not None else None
        sequences = x_TD.shape[0] // x.shape[-2] if x.dim() > 2 else 1
        context = RouterContext(0, self.training, ids_T, noise, num_sequences=sequences)
        with torch.autocast(kind, enabled=False):
            y_TD, self.metrics = self.layer.forward(ops, self.arrays(), x_TD, context)
        self.auxiliary_loss = self.layer.auxiliary_loss(ops, self.metrics)
        return ops.reshape(y_TD, x.shape)

    def _check(self, token_ids: Tensor | None, x: Tensor) -> None:
        expected = tuple(x.shape[:-1])
        if token_ids is None or tuple(token_ids.shape) != expected:
            got = "none" if token_ids is None else f"the shape {tuple(token_ids.shape)}"
            raise UserError(
                f"router {self.layer.config.router.name} looks at vocabulary ids; expected token_ids of the shape "
                f"{expected}, one for each token of x, got {got}: call layer(x, token_ids=ids)"
            )

    @torch.no_grad()
    def update_router_state(self) -> None:
        """Call after an optimiser step: updates the state that the router balances with (the bias of `sigmoid_bias`),
        and an estimated capacity.

        Uses what the last call measured in this process; does nothing for layers without such state.
        """
        if self.metrics is None:
            return
        arrays = self.arrays()
        names = [spec.name for spec in self.layer.parameter_specs() if not (spec.trainable or spec.is_table)]
        state = {name: arrays[name].detach().float().cpu().numpy() for name in names}
        load_E, affinity_3E = (x.cpu().numpy() for x in (self.metrics.chosen_E, self.metrics.affinity_3E))
        for name, value in self.layer.updated_state(state, load_E, affinity_3E).items():
            arrays[name].copy_(torch.from_numpy(value))

    def __getstate__(self) -> dict[str, Any]:
        # The results of the last call are part of its graph, which can be neither copied nor pickled.
        return {**self.__dict__, "auxiliary_loss": None, "metrics": None}

    def extra_repr(self) -> str:
        """Shapes and router, for print(model)."""
        config = self.layer.config
        return (
            f"d_model={self.layer.d_model}, num_experts={config.num_experts}, expert_hidden={config.expert_hidden}, "
            f"router={config.router.name}, capacity={config.capacity.policy}"
        )


_EXPLICIT = [name for name, p in signature(MoE).parameters.items() if p.kind is not p.VAR_KEYWORD]
"""Parameters of MoE other than `options`."""


def _checked_counts(token_counts: Sequence[int] | np.ndarray | Tensor, vocab_size: int) -> np.ndarray:
    counts_V = torch.as_tensor(token_counts).cpu().numpy()
    if counts_V.ndim != 1 or len(counts_V) > vocab_size:
        raise UserError(
            f"token_counts has the shape {counts_V.shape}; expected one number for each vocabulary id, at most "
            f"vocab_size ({vocab_size})"
        )
    return counts_V
