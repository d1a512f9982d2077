"""The mixture-of-experts layer as an ordinary PyTorch module."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from inspect import signature
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from typing_extensions import override

from moeport.backends.torch.fused import operations
from moeport.backends.torch.private import is_view, result_of_its_own
from moeport.core.parameters import ParameterSpec, is_normal
from moeport.core.routing import RouterContext, Routing, SoftRouting, Topology
from moeport.errors import UserError
from moeport.model.moe import MoELayer
from moeport.model.moe_metrics import MoEMetrics
from moeport.torch.calls import add_up, on_host, over_ranks
from moeport.torch.options import MoEOptions, checked_kernels, layer_config
from moeport.torch.part import Holder, Part
from moeport.torch.refusals import refuse, refuse_capture, refuse_replica


class MoE(Holder):
    """A mixture-of-experts feed-forward block: use it where a model has its FFN.

    It has a state_dict, moves with `.to`, follows autocast, and may be compiled, recomputed and sharded. Its parts are
    modules that the layer calls: `router`, `experts`, and those of `shared`, `mixing` and `dense` that the options ask
    for. Router, capacity and losses are those of the `model.moe` section of the config; see `moeport routers` for the
    names.

    Args:
        d_model: width D of input and output.
        num_experts: routed experts E.
        expert_hidden: hidden width F of one expert.
        router_options: the router's own options, such as `{"top_k": 2}`.
        init_std: standard deviation of initial weights.
        vocab_size: number V of vocabulary ids, for routers that look at them.
        token_counts: how often each id occurs in the training set, from id 0 on, for routers that look at ids; missing
            ids count 0. Default: all equally often.
        seed: seed of the initial weights, which are then the same in every layer with this seed. Default: they are
            drawn from torch's generator, as those of any module, so that each layer has its own.
        device: device of the parameters. Default: torch's default device.
        dtype: type of the parameters. Default: torch's default type. The state of routers and capacities keeps float32.
        kernels: fused operators of the device, as `backend.kernels` of the config: `auto`, `default` for none, or a
            choice by kernel, such as `{"grouped_mlp": "default"}`.
        **options: the other keys of `model.moe` for one layer, such as `router="switch"`,
            `capacity={"policy": "factor", "factor": 1.25}`, `activation="gelu"`, `num_shared_experts=1` or
            `load_balance={"coefficient": 0}`. `MoEOptions` lists them with types and meanings; defaults are those of
            the config. Router and capacity may be given by name or as a section. For `cartesian`, the module is one of
            its two sub-layers.

    Raises:
        ConfigError: an option is unknown or out of range; the message names it.
        UserError: the router looks at vocabulary ids, and vocab_size is missing or less than the token counts.
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
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        kernels: str | Mapping[str, str] = "auto",
        **options: Unpack[MoEOptions],
    ):
        given = {"num_experts": num_experts, "expert_hidden": expert_hidden, **options}
        config = layer_config(d_model, given, router_options or {}, _EXPLICIT)
        layer = MoELayer(config, d_model, init_std, init_std, vocab_size)
        counts_V = None if token_counts is None else _checked_counts(token_counts, vocab_size or 0)
        parts: dict[str, dict[str, ParameterSpec]] = {"": {}, "router": {}}
        for spec in layer.parameter_specs():
            part, _, name = spec.name.rpartition(".")
            parts.setdefault(part, {})[name] = spec
        super().__init__(parts.pop(""), seed, counts_V, device, dtype)
        self._part_names = list(parts)
        for part, specs in parts.items():
            self.add_module(part, Part(specs, seed, counts_V, device, dtype))
        self.layer = layer
        self.kernels = checked_kernels(kernels)
        self._auxiliary_loss: Tensor | None = None
        self._loss_is_cut_off = self._has_warned = False
        self._metrics: MoEMetrics | None = None
        self._sums: tuple[Tensor, ...] | None = None
        self._metrics_were_set = False

    @override
    def reset_parameters(self) -> None:
        """Draw the initial values of all parts again; with a `seed`, the same ones."""
        super().reset_parameters()
        for part in self._parts().values():
            part.reset_parameters()

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., D); under autocast it is cast to the autocast type. The second-to-last dimension runs along a
                sequence, which matters for routers in which experts choose among the tokens of a sequence. Any
                dimension but the last may be 0.
            token_ids: vocabulary ids (...), for routers that look at them.

        Returns: the shape of `x`.

        Raises UserError if `x` is not of width D, or the router looks at ids and gets none, or not one per token; and
        where the layer cannot run: under torch.export, torch.jit, ONNX export, torch.vmap, and nn.DataParallel in
        training.
        """
        refuse_capture(x)
        refuse_replica(self)
        self._check(x, token_ids)
        kind = x.device.type
        ops = operations(x.device, self.kernels)
        x_TD = x.to(_compute_type(x)).reshape(-1, x.shape[-1])
        noise = {}
        if self.training:
            draws = {name: torch.randn if is_normal(name) else torch.rand for name in self.layer.noise}
            noise = {name: draw(x_TD.shape[0], device=x.device) for name, draw in draws.items()}
        ids_T = token_ids.reshape(-1) if token_ids is not None else None
        sequences = math.prod(x.shape[:-2]) if x.dim() > 2 else 1
        # Spelled out, since torch.compile cannot take an object from the default of a dataclass.
        context = RouterContext(0, self.training, ids_T, noise, sequences, Topology())
        with torch.autocast(kind, enabled=False):
            y_TD, metrics = self.layer.forward(ops, self.own_arrays(), x_TD, context, self._run_experts, self._run_part)
        self._keep(metrics, self.layer.auxiliary_loss(ops, metrics, ops.dtype(ops.accurate(x_TD[:0]))))
        return _not_a_view(ops.reshape(y_TD, x.shape))

    def _run_part(self, part: str, compute: Callable[..., Any], *arrays: Tensor) -> Any:
        """Implements `moeport.core.dispatch.RunPart`: calls the module, which returns only tensors, so that hooks on
        its result see them.
        """
        routings: list[Routing | SoftRouting] = []

        def tensors(params: Mapping[str, Tensor], *arrays: Tensor) -> Any:
            result = compute(params, *arrays)
            if isinstance(result, Tensor):
                return _not_a_view(result)
            routings.append(result)
            return tuple(_not_a_view(getattr(result, name)) for name in _tensor_fields(result))

        result = getattr(self, part)(*arrays, compute=tensors)
        if not routings:
            return result
        return replace(routings[-1], **dict(zip(_tensor_fields(routings[-1]), result, strict=True)))

    def _run_experts(self, compute: Callable[..., Tensor], *arrays: Tensor) -> Tensor:
        """Implements `moeport.core.dispatch.RunExperts`."""

        def weighted(params: Mapping[str, Tensor], *arrays: Tensor) -> Tensor:
            return _not_a_view(compute(params["w_in"], params["w_out"], *arrays))

        return self.experts(*arrays, compute=weighted)

    def _keep(self, metrics: MoEMetrics, auxiliary_loss: Tensor) -> None:
        """What a call leaves behind: its metrics and loss and, of a training call, what the router state follows."""
        self._metrics, self._metrics_were_set = metrics, False
        self._auxiliary_loss = auxiliary_loss
        self._loss_is_cut_off = self.training and not torch.is_grad_enabled()
        if self.training and torch.is_grad_enabled() and self._state():
            metrics = self._filled(metrics)
            self._sums = add_up(self._sums, (metrics.chosen_E, metrics.affinity_4E))

    def _filled(self, metrics: MoEMetrics) -> MoEMetrics:
        """With zeros for what is off: they are made only where somebody looks."""
        assert isinstance(metrics.chosen_E, Tensor)
        return metrics.filled(operations(metrics.chosen_E.device, self.kernels), "float32")

    @property
    def auxiliary_loss(self) -> Tensor | None:
        """The weighted auxiliary losses of the last call, a scalar to add to the training loss.

        Warns, once, if a training call made it without a gradient: the router then learns nothing from it.
        """
        if self._loss_is_cut_off and not self._has_warned and bool(self._auxiliary_loss):
            self._has_warned = True
            warnings.warn(_CUT_OFF, stacklevel=2)
        return self._auxiliary_loss

    @property
    def metrics(self) -> Any:
        """`MoEMetrics` of the last call: unweighted losses, assignments chosen and served per expert.

        If you assign to it, `update_router_state` uses the assigned value, until the next call.
        """
        if self._metrics is not None:
            self._metrics = self._filled(self._metrics)
        return self._metrics

    @metrics.setter
    def metrics(self, metrics: MoEMetrics | None) -> None:
        self._metrics, self._metrics_were_set, self._sums = metrics, metrics is not None, None

    @torch.no_grad()
    def update_router_state(self, process_group: ProcessGroup | None = None) -> None:
        """Call after an optimiser step: updates the state that the router balances with (the bias of `sigmoid_bias`),
        and an estimated capacity.

        It follows all training calls since the last update, such as those of accumulated gradients; calls in evaluation
        mode or without gradients do not count, and a recomputed call counts once. Does nothing for layers without such
        state, and if there was no such call.

        Args:
            process_group: sums over its ranks, each of which must call this, so that the state stays the same on all of
                them; such as `torch.distributed.group.WORLD` under DDP or FSDP. Default: this process alone.
        """
        state = self._state()
        sums, self._sums = self._sums, None
        if self._metrics_were_set and self._metrics is not None:
            metrics = self._filled(self._metrics)
            sums = (metrics.chosen_E, metrics.affinity_4E)
        if not state or (sums is None and process_group is None):
            return
        experts = self.layer.config.num_experts
        device = next(iter(state.values())).device
        if sums is None:
            sums = (torch.zeros(experts, dtype=torch.long, device=device), torch.zeros(4, experts, device=device))
        if process_group is None:
            load_E, affinity_4E = (on_host(x) for x in sums)
        else:
            load_E, affinity_4E = over_ranks([sums[0], sums[1].float()], process_group)
        values = {name: value.detach().cpu().numpy() for name, value in state.items()}
        for name, value in self.layer.updated_state(values, load_E, affinity_4E).items():
            state[name].copy_(torch.from_numpy(value))

    def _state(self) -> dict[str, Tensor]:
        """The buffers that `update_router_state` updates, by their names in the layer."""
        found = {}
        for prefix, module in {"": self, **self._parts()}.items():
            for name in module.state_names:
                found[f"{prefix}.{name}" if prefix else name] = module.get_buffer(name)
        return found

    def _parts(self) -> dict[str, Part]:
        """The parts by name, without what wraps them."""
        wrapped = {name: self.get_submodule(name).modules() for name in self._part_names}
        return {name: next(m for m in modules if isinstance(m, Part)) for name, modules in wrapped.items()}

    def _check(self, x: Tensor, token_ids: Tensor | None) -> None:
        if x.dim() == 0 or x.shape[-1] != self.layer.d_model or not x.dtype.is_floating_point:
            raise UserError(
                f"x is {x.dtype} of the shape {tuple(x.shape)}; expected a floating-point type and a last dimension of "
                f"d_model ({self.layer.d_model})"
            )
        expected = tuple(x.shape[:-1])
        if self.layer.config.router.needs_token_ids and (token_ids is None or tuple(token_ids.shape) != expected):
            got = "none" if token_ids is None else f"the shape {tuple(token_ids.shape)}"
            raise UserError(
                f"router {self.layer.config.router.name} looks at vocabulary ids; expected token_ids of the shape "
                f"{expected}, one for each token of x, got {got}: call layer(x, token_ids=ids)"
            )

    def __getstate__(self) -> dict[str, Any]:
        # The results of the last call are part of its graph, which can be neither copied nor pickled.
        return {**self.__dict__, "_auxiliary_loss": None, "_metrics": None, "_metrics_were_set": False}

    def __prepare_scriptable__(self) -> nn.Module:  # torch.jit.script calls it
        refuse("torch.jit.script")

    @override
    def extra_repr(self) -> str:
        config = self.layer.config
        return (
            f"d_model={self.layer.d_model}, num_experts={config.num_experts}, expert_hidden={config.expert_hidden}, "
            f"router={config.router.name}, capacity={config.capacity.policy}"
        )


_EXPLICIT = [name for name, p in signature(MoE).parameters.items() if p.kind is not p.VAR_KEYWORD]
"""Parameters of MoE other than `options`."""

_CUT_OFF = (
    "the auxiliary loss of moeport.torch.MoE was made without a gradient in training mode, so that adding it to the "
    "loss does nothing; with torch.utils.checkpoint, pass use_reentrant=False, and evaluate in eval() mode"
)


def _compute_type(x: Tensor) -> torch.dtype:
    """The type of the computation: that of autocast, if it is on and would cast `x`, or that of `x`."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype is not torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _not_a_view(x: Tensor) -> Tensor:
    """The same memory as a result of its own, as linear layers return it, so that FSDP's hooks on it survive in-place
    operations.
    """
    if torch.compiler.is_compiling() or not is_view(x):
        return x
    return result_of_its_own(x)


def _tensor_fields(routing: Routing | SoftRouting) -> list[str]:
    return [field.name for field in fields(routing) if isinstance(getattr(routing, field.name), Tensor)]


def _checked_counts(token_counts: Sequence[int] | np.ndarray | Tensor, vocab_size: int) -> np.ndarray:
    counts_V = torch.as_tensor(token_counts).cpu().numpy()
    if counts_V.ndim != 1 or len(counts_V) > vocab_size:
        raise UserError(
            f"token_counts has the shape {counts_V.shape}; expected one number for each vocabulary id, at most "
            f"vocab_size ({vocab_size})"
        )
    return counts_V
