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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from moeport.backends.torch.device import device_words
from moeport.backends.torch.module import ParameterTree
from moeport.backends.torch.ops import TorchOps
from moeport.backends.torch.recording import device_of, watch
from moeport.config import config_from_dict
from moeport.config.model import MoEConfig
from moeport.core.moe import MoELayer, MoEMetrics
from moeport.core.parameters import initial_parameters
from moeport.core.routing import RouterContext
from moeport.errors import UserError
from moeport.parity.bundle import save_bundle
from moeport.parity.recorder import Recorder
from moeport.parity.recording import FLOATS, SAMPLE_SIZE, SAMPLED, Keep, Kind, Recording, environment
from moeport.parity.thresholds import coarser

__all__ = ["MoE", "ModuleRecording", "record"]


class MoE(ParameterTree):
    """A mixture-of-experts feed-forward block: use it where a model has its FFN.

    It has a state_dict, moves with `.to`, follows autocast, and may be compiled and recomputed. Router,
    capacity and losses are those of the `model.moe` section of the config; see `moeport routers` for the names.

    Args:
        d_model: width D of input and output.
        num_experts: routed experts E.
        expert_hidden: hidden width F of one expert.
        router: name of the router; of `cartesian` this is one of the two sub-layers.
        router_options: the router's own options, such as `{"top_k": 2}`.
        capacity: name of the capacity policy, or the `model.moe.capacity` section such as
            `{"policy": "factor", "factor": 1.25, "drop": "probability"}`.
        activation: swiglu or gelu.
        num_shared_experts: experts that every token passes.
        shared_mixing: add or softmax, as in `model.moe.shared_mixing`; default the router's own.
        residual_hidden: hidden width of a dense block beside the experts; 0: none.
        routed_scaling_factor: multiplies the routed experts' output.
        load_balance: the `model.moe.load_balance` section; default the router's own coefficient.
        router_z_loss: weight of the router z-loss.
        init_std: standard deviation of initial weights.
        vocab_size: number V of vocabulary ids, for routers that look at them.
        token_counts: how often each of the first ids occurs in the training set, for routers that look at ids; what is
            missing counts 0. Default: all alike.
        seed: of the initial weights; layers of one model need different ones.
        device: where the parameters are placed.
        dtype: type of the parameters.

    Raises:
        ConfigError: an option is unknown or out of range; the message names it.
        UserError: the router looks at vocabulary ids, and vocab_size is missing or less than the token counts.

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
        shared_mixing: Literal["add", "softmax"] | None = None,
        residual_hidden: int = 0,
        routed_scaling_factor: float = 1.0,
        load_balance: Mapping[str, Any] | None = None,
        router_z_loss: float = 0.0,
        init_std: float = 0.02,
        vocab_size: int | None = None,
        token_counts: Sequence[int] | np.ndarray | Tensor | None = None,
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
            shared_mixing=shared_mixing,
            residual_hidden=residual_hidden,
            routed_scaling_factor=routed_scaling_factor,
            **({} if load_balance is None else {"load_balance": dict(load_balance)}),
            router_z_loss=router_z_loss,
        )
        layer = MoELayer(config, d_model, init_std, init_std, vocab_size)
        specs = layer.parameter_specs()
        counts = None if token_counts is None else partial(_checked_counts, token_counts, vocab_size or 0)
        place = torch.device(device) if device is not None else torch.get_default_device()
        super().__init__(specs, initial_parameters(specs, seed, counts), place, dtype)
        self.layer = layer
        self.auxiliary_loss: Tensor | None = None
        self.metrics: MoEMetrics | None = None

    def forward(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: (..., D); under autocast it is taken in the autocast type, else in its own. The last dimension but one
                runs along a sequence, which matters to routers whose experts choose from one.
            token_ids: vocabulary ids (...), for routers that look at them.

        Returns: the shape of `x`.

        Raises UserError if the router looks at ids and has none, or not one for each token.
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
        return y_TD.reshape(x.shape)

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
        """After an optimiser step: let the router move what it balances by (the bias of `sigmoid_bias`), and an
        estimated capacity follow the tokens.

        Uses what the last call measured on this process; layers without such state do nothing.
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
    """The checked section; head counts are those of any valid attention, since there is none here, and routers may look
    ahead, since not every model that the layer is for is causal.
    """
    attention = {"num_heads": 1, "head_dim": 2}
    moe = {"allow_future_tokens": True, **options}
    return config_from_dict({"model": {"d_model": d_model, "attention": attention, "moe": moe}}).model.moe


def _checked_counts(token_counts: Sequence[int] | np.ndarray | Tensor, vocab_size: int) -> np.ndarray:
    counts_V = torch.as_tensor(token_counts).cpu().numpy()
    if counts_V.ndim != 1 or len(counts_V) > vocab_size:
        raise UserError(
            f"token_counts has the shape {counts_V.shape}; expected one number for each vocabulary id, at most "
            f"vocab_size ({vocab_size})"
        )
    return counts_V


class ModuleRecording:
    """What `record` yields: collects one pass of a module.

    Attributes:
        recording: the whole, once the block has ended.
    """

    def __init__(self, model: nn.Module, name: str, keep: Mapping[str, Keep], sample_size: int):
        self._model, self._name = model, name
        self._device = device_of(model)
        self._ops = TorchOps(self._device)
        self._recorder = Recorder(keep, sample_size=sample_size)
        self._types: list[str] = []
        self.recording: Recording | None = None
        for kind, tensors in (("parameter", model.named_parameters()), ("parameter", model.named_buffers())):
            for label, tensor in tensors:
                self._store(f"{kind}:{label}", "parameter", tensor)

    def add(self, name: str, x: Tensor) -> None:
        """Record a tensor that no module returns, such as the loss; a scalar counts as a loss."""
        self._store(f"user:{name}", "loss" if x.dim() == 0 else "activation", x)

    def _seen(self, what: str, name: str, x: Tensor, given: list[Tensor]) -> None:
        """One tensor of the pass; what is not the first of its name is a further call of the module."""
        kinds: dict[str, Kind] = {"input": "input", "output": "activation", "gradient": "gradient"}
        kind = kinds[what]
        if what == "output" and not self._is_float(x):
            kind = "plan"
        label = f"gradient:{name}" if what == "gradient" else name
        if what == "output":
            self._types += [self._ops.dtype(x)] if self._is_float(x) else []
            calls = sum(known == label or known.startswith(f"{label}#") for known in self._recorder.tensors)
            label = f"{label}#{calls + 1}" if calls else label
        self._store(label, kind, x, given)

    def _is_float(self, x: Tensor) -> bool:
        return self._ops.dtype(x) in FLOATS

    def _store(self, name: str, kind: Kind, x: Tensor, given: list[Tensor] | None = None) -> None:
        recorder = self._recorder
        inputs = tuple(dict.fromkeys(source for tensor in given or () for source in recorder.sources(tensor)))
        op = name.rpartition(":")[2].partition("#")[0] if given is not None and kind in ("activation", "plan") else None
        recorder.store(self._ops, name, kind, x.detach(), op, inputs)
        recorder.trace(x, (name,))

    def _finished(self) -> Recording:
        kernels = {"model": type(self._model).__name__}
        versions = {"torch": torch.__version__}
        dtype = self._types[0] if self._types else "float32"
        for other in self._types[1:]:
            dtype = coarser(dtype, other)
        return Recording(
            name=self._name,
            dtype=dtype,
            tensors=self._recorder.finish(),
            environment=environment("torch", device_words(self._device), versions, kernels),
            sample_size=self._recorder.sample_size,
        )


@contextmanager
def record(
    model: nn.Module,
    bundle: Path | str | None = None,
    *,
    name: str | None = None,
    keep: Mapping[str, Keep] | None = None,
    sample_size: int = SAMPLE_SIZE,
) -> Iterator[ModuleRecording]:
    """Record the next forward pass of any module, and its backward pass, for `moeport parity compare`.

    Recorded are parameters, buffers, inputs, the output of every submodule, the gradients of outputs and of parameters,
    and what is added by name. Later passes inside the block are not recorded.

    Args:
        model: any module.
        bundle: folder to write when the block ends without an error; None: only `recording` is kept.
        name: of this side in reports; default the name of the folder, or of the class.
        keep: how much of each kind of tensor is kept, such as `{"activation": "statistics"}`; default samples of
            parameters, activations and gradients, all of the rest.
        sample_size: entries of a sampled tensor.
    """
    side = name or (Path(bundle).name if bundle else type(model).__name__)
    collected = ModuleRecording(model, side, SAMPLED if keep is None else keep, sample_size)
    with watch(model, collected._seen):
        yield collected
    collected.recording = collected._finished()
    if bundle is not None:
        save_bundle(collected.recording, Path(bundle))
