"""The model as nn.Modules that hold the parameters and run the neutral forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from moeport.backends.torch.ops import TorchOps
from moeport.core.parameters import ParameterSpec, subtree
from moeport.core.routing import RouterContext
from moeport.model.batch import Batch
from moeport.model.block import Block
from moeport.model.cache import NewTokens
from moeport.model.decoding import next_scores
from moeport.model.forward_pass import BlockOutput, Pass
from moeport.model.loss_terms import LossTerms
from moeport.model.transformer import Transformer

HeldShape = Callable[[ParameterSpec], tuple[int, ...]]
COPY = "{}_in_compute_type"
"""Name of the attribute beside a parameter that holds its copy."""


class ExpertsModule(nn.Module):
    """The local experts of one layer; sharded as a unit."""

    def forward(self, compute: Callable[..., Tensor], *arrays: Tensor) -> Tensor:
        """Implements `moeport.core.dispatch.RunExperts`."""
        w_in, w_out = (getattr(self, COPY.format(name), getattr(self, name)) for name in ("w_in", "w_out"))
        return compute(w_in, w_out, *arrays)


class ParameterTree(nn.Module):
    """Parameters with dotted names, so that `state_dict` has the names of the specs.

    Their values are not set: `moeport.backends.torch.placing` fills them.

    Args:
        specs: names and shapes; untrained ones become buffers.
        held: the shape of what this rank has of a parameter before it is distributed.
        device: where they are; the meta device if they will be distributed.
        dtype: type of the parameters.
    """

    def __init__(self, specs: Iterable[ParameterSpec], held: HeldShape, device: torch.device | str, dtype: torch.dtype):
        super().__init__()
        self._owners: list[tuple[str, nn.Module, str]] = []
        for spec in specs:
            *path, leaf = spec.name.split(".")
            owner: nn.Module = self
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, ExpertsModule() if part == "experts" else nn.Module())
                owner = getattr(owner, part)
            kind = torch.float32 if spec.is_table else dtype
            value = torch.empty(held(spec), device=device, dtype=kind)
            if spec.trainable:
                owner.register_parameter(leaf, nn.Parameter(value))
            else:
                owner.register_buffer(leaf, value)
            self._owners.append((spec.name, owner, leaf))

    def arrays(self) -> dict[str, Tensor]:
        """Parameters or their copies, and buffers, by dotted name, as they are now (sharded ones gathered by their
        hooks).
        """
        return {name: getattr(owner, leaf) for name, owner, leaf in self._owners}

    def use_copies(self, copies: Mapping[str, Tensor]) -> None:
        """Use these arrays in place of the parameters of the same names."""
        for index, (name, owner, leaf) in enumerate(self._owners):
            if name in copies:
                setattr(owner, COPY.format(leaf), copies[name])
                self._owners[index] = name, owner, COPY.format(leaf)


class BlockModule(ParameterTree):
    """One transformer block; the unit of sharding, compilation and recomputation."""

    def __init__(
        self,
        block: Block,
        held: HeldShape,
        device: torch.device | str,
        dtype: torch.dtype,
        activation_checkpointing: bool,
    ):
        super().__init__(block.parameter_specs(), held, device, dtype)
        self.block, self.activation_checkpointing = block, activation_checkpointing

    @override
    def forward(self, run: Pass, x_BSD: Tensor, context: RouterContext) -> BlockOutput:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(self._run, run, x_BSD, context, use_reentrant=False)
        return self._run(run, x_BSD, context)

    def _run(self, run: Pass, x_BSD: Tensor, context: RouterContext) -> BlockOutput:
        return self.block.forward(run, self.arrays(), x_BSD, context, self._run_experts)

    def _run_experts(self, suffix: str) -> ExpertsModule:
        return getattr(self, f"moe{suffix}").experts


class TransformerModule(ParameterTree):
    """The whole model.

    Args:
        model: shapes and forward pass.
        ops: operations on the device that it will be on.
        held: see `ParameterTree`.
        device: see `ParameterTree`.
        dtype: type of the parameters.
        compute_dtype: type of activations, and of weights in products.
        activation_checkpointing: recompute blocks in the backward pass.
    """

    def __init__(
        self,
        model: Transformer,
        ops: TorchOps,
        held: HeldShape,
        device: torch.device | str,
        dtype: torch.dtype,
        compute_dtype: str,
        activation_checkpointing: bool = False,
    ):
        outside = [spec for spec in model.parameter_specs() if not spec.name.startswith("layers.")]
        super().__init__(outside, held, device, dtype)
        self.layers = nn.ModuleList(
            BlockModule(block, held, device, dtype, activation_checkpointing) for block in model.blocks
        )
        self.model, self.ops, self.compute_dtype = model, ops, compute_dtype
        self._rope: dict[int, tuple[Tensor, Tensor]] = {}

    @override
    def use_copies(self, copies: Mapping[str, Tensor]) -> None:
        super().use_copies(copies)
        for number, block in enumerate(self.layers):
            block.use_copies(subtree(f"layers.{number}", copies))

    def rope(self, sequence_length: int) -> tuple[Tensor, Tensor]:
        """Rotary tables, computed once per length."""
        if sequence_length not in self._rope:
            self._rope[sequence_length] = self.model.rope(self.ops, sequence_length, self.compute_dtype)
        return self._rope[sequence_length]

    def _pass(self, sequence_length: int) -> Pass:
        rope = self.rope(sequence_length)
        return Pass(self.ops, self.compute_dtype, rope, self.training, run_block=self._run_block)

    def _run_block(self, run: Pass, x_BSD: Tensor, context: RouterContext) -> BlockOutput:
        return self.layers[context.layer](run, x_BSD, context)

    def forward(self, batch: Batch) -> LossTerms:
        """Loss terms of a batch of device arrays; routers draw noise in training mode."""
        return self.model.loss(self._pass(batch.token_BS.shape[1]), self.arrays(), batch)

    def logits(self, token_BS: Tensor) -> Tensor:
        """Next-token or class scores in the compute type."""
        return self.model.logits(self._pass(token_BS.shape[1]), self.arrays(), Batch(token_BS, token_BS))

    def token_losses(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of each target (B, S)."""
        return self.model.token_losses(self._pass(batch.token_BS.shape[1]), self.arrays(), batch)

    def read(self, new: NewTokens) -> Tensor:
        """Scores (B, V) after new tokens, which are added to their cache."""
        return next_scores(self.model, self.ops, self.compute_dtype, self.arrays(), new, self._run_block)
