"""Where each parameter of an upcycled model comes from, and what cannot be made from the source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from moeport.config.model import ModelConfig, MoEConfig
from moeport.config.schema import Config
from moeport.convert.floats import CODES
from moeport.core.parameters import ParameterSpec, generator, initial_value
from moeport.core.weights import Box, Weights
from moeport.errors import UserError
from moeport.model.decoder import DecoderLM
from moeport.routers import BY_NAME
from moeport.routers.topk import TopKConfig
from moeport.training.tensor_file import NewTensor


@dataclass(frozen=True)
class UpcycleOptions:
    """What the source does not say."""

    noise: float = 0.0
    """Standard deviation of the noise added to each expert's weights, as a share of theirs."""
    router: Literal["normal", "zeros"] = "normal"
    """New rows of the router: drawn as for a new model, or zeros, so that at first the first experts are chosen."""
    seed: int = 0
    checkpoint: str = "latest"
    """latest, best or step-N."""


def slices_of(old: ModelConfig, new: ModelConfig) -> int:
    """Experts that one feed-forward block is cut into. Raises UserError if it cannot be cut so."""
    width, hidden = _block_width(old, new), new.moe.expert_hidden
    if width % hidden:
        raise UserError(
            f"model.moe.expert_hidden: {hidden} does not divide {width}, the hidden width of the source's blocks; "
            f"expected {width} or a divisor of it"
        )
    return width // hidden


def _block_width(old: ModelConfig, new: ModelConfig) -> int:
    """Hidden width of the source's blocks that become experts."""
    widths = {old.moe.expert_hidden if old.is_moe_layer(layer) else old.dense_width for layer in new.moe_layers}
    if len(widths) > 1:
        raise UserError(
            f"model.moe: the blocks that become experts have different hidden widths, {sorted(widths)}; choose those "
            "of one width with model.moe.dense_layers"
        )
    return widths.pop()


class Plan:
    """Where each parameter of the new model comes from.

    Args:
        old: the `model` section of the source.
        config: the config of the new run.
        stored: the parameters of the source.
        options: what the source does not say.
    """

    def __init__(self, old: ModelConfig, config: Config, stored: Weights, options: UpcycleOptions):
        self.old, self.new, self.config = old, config.model, config
        self.stored, self.options = stored, options
        self.slices = slices_of(old, self.new)
        self.vocab_size = stored.shape("embedding.weight")[0]
        self.specs = DecoderLM(self.new, self.vocab_size).parameter_specs()
        self.dtype = CODES[stored.dtype("embedding.weight")]
        for layer in self.new.moe_layers:
            self._check_experts(layer)
        self._check_router()

    @property
    def is_same(self) -> bool:
        """Whether the new model computes what the source did."""
        if _others(self.old) != _others(self.new) or self.options.noise:
            return False
        return all(self._is_same_layer(layer) for layer in range(self.new.num_layers))

    def _is_same_layer(self, layer: int) -> bool:
        """Whether a layer computes what it did, given that its experts are copies or slices."""
        old, new, scale = _plain_router(self.old.moe), _plain_router(self.new.moe), 1.0
        if self.old.is_moe_layer(layer):
            if old is None:
                return False
            scale = self.old.moe.routed_scaling_factor
        if not self.new.is_moe_layer(layer):
            return scale == 1
        if new is None or self.new.moe.routed_scaling_factor != scale * self.slices:
            return False
        if old is None or self._experts_before(layer) == 1:
            return new.gates_sum_to_one
        return new.top_k == old.top_k * self.slices and new.gates_sum_to_one == old.gates_sum_to_one

    def _experts_before(self, layer: int) -> int:
        return self.old.moe.num_experts if self.old.is_moe_layer(layer) else 1

    def tensors(self) -> list[NewTensor]:
        """The parameters of the new model, each made while it is written.

        Raises UserError for one that the source cannot give, and for one of the source that has no place.
        """
        used = {self._check(spec) for spec in self.specs if not _is_router(spec.name) and not spec.is_state}
        for spec in DecoderLM(self.old, self.vocab_size).parameter_specs():
            if spec.name not in used and not _is_router(spec.name) and not spec.is_state:
                raise UserError(f"{spec.name}: the source has it, and the new model has no place for it; {_ONLY}")
        return [NewTensor(spec.name, self.dtype, spec.shape, partial(self._written, spec)) for spec in self.specs]

    def _check(self, spec: ParameterSpec) -> str:
        """The name in the source of what a parameter is made from. Raises UserError if it is not there."""
        name, wanted = self._name_of(spec), spec.shape
        if spec.is_expert:
            name, cut = self._block_of(spec.name), 0 if spec.name.endswith(".w_in") else 1
            wanted = tuple(size * (self.slices if dim == cut else 1) for dim, size in enumerate(spec.shape[1:]))
        found = self.stored.shape(name) if name in self.stored else None
        if found is None or found[-len(wanted) :] != wanted:
            shape = "nothing" if found is None else found
            raise UserError(f"{spec.name}: the new model needs {wanted}, and the source has {shape}; {_ONLY}")
        return name

    def _name_of(self, spec: ParameterSpec) -> str:
        """Its name in the source, where a dense block may be a mixture of one expert."""
        one = spec.name.replace(".mlp.", ".moe.experts.")
        return one if one in self.stored and self.old.moe.num_experts == 1 else spec.name

    def _block_of(self, name: str) -> str:
        """The name in the source of what experts are made from: experts, or a dense block."""
        return name if name in self.stored else name.replace(".moe.experts.", ".mlp.")

    def _check_experts(self, layer: int) -> None:
        """Raises UserError if the number of experts is not that of whole copies."""
        if self.new.moe.router.sub_layers > 1:
            raise UserError(
                f"model.moe.router.name: {self.new.moe.router.name} has two layers in a block; choose another"
            )
        before = self._experts_before(layer)
        whole = before * self.slices
        if self.new.moe.num_experts % whole or (before > 1 and self.new.moe.num_experts != whole):
            expected = f"a multiple of {whole}" if before == 1 else f"{whole}"
            raise UserError(
                f"model.moe.num_experts: {self.new.moe.num_experts} experts cannot be made from {before} in layer "
                f"{layer}, each cut into {self.slices}; expected {expected}"
            )

    def _check_router(self) -> None:
        if self.slices > 1 and self.new.moe.router.experts_per_token % self.slices:
            raise UserError(
                f"model.moe.router: {self.new.moe.router.experts_per_token} experts per token are not a whole number "
                f"of copies, which have {self.slices} slices; expected a multiple of {self.slices}"
            )
        tables = [spec.name for spec in self.specs if spec.is_table]
        if tables:
            raise UserError(
                f"model.moe.router.name: {self.new.moe.router.name} has a table made from the training data, which is "
                "not there; choose another router"
            )

    def _written(self, spec: ParameterSpec) -> Iterator[bytes]:
        for values in self._values(spec):
            yield values.astype("<f8" if self.dtype == "F64" else "<f4").tobytes()

    def _values(self, spec: ParameterSpec) -> Iterator[np.ndarray]:
        if spec.is_expert:
            for expert in range(spec.shape[0]):
                yield self._noisy(spec.name, expert, self._expert(spec.name, expert))
        elif _is_router(spec.name):
            yield self._router(spec)
        elif spec.is_state:
            yield initial_value(spec, self.options.seed)
        else:
            yield from self.stored.run(self._name_of(spec), 0, spec.size)

    def _expert(self, name: str, expert: int) -> np.ndarray:
        """One expert's w_in or w_out: a slice of a block of the source."""
        copy, part = divmod(expert, self.slices)
        width, hidden = self.new.moe.expert_hidden * self.slices, self.new.moe.expert_hidden
        block = self._block_of(name)
        whole = Box.whole(self.stored.shape(block))
        shape = whole.shape[-2:]
        own = whole.rows(copy % whole.shape[0], 1) if len(whole.shape) == 3 else whole
        values = self.stored.read(block, own).reshape(shape)
        if name.endswith(".w_out"):
            return values[:, part * hidden : (part + 1) * hidden]
        halves = values.reshape(-1, width, shape[1])  # gate and up, or one for GELU
        return halves[:, part * hidden : (part + 1) * hidden]

    def _noisy(self, name: str, expert: int, values: np.ndarray) -> np.ndarray:
        if self.options.noise == 0:
            return values
        random = generator(self.options.seed, "upcycle", name, expert)
        return values + self.options.noise * values.std() * random.standard_normal(values.shape)

    def _router(self, spec: ParameterSpec) -> np.ndarray:
        """A parameter of the router: the source's rows, each for all slices of its expert, and new ones below."""
        fresh = initial_value(spec, self.options.seed).astype(np.float64)
        if self.options.router == "zeros" and spec.init == "normal":
            fresh[:] = 0
        if not spec.name.endswith("router.weight") or not BY_NAME[self.new.moe.router.name].config_class.has_gate_rows:
            return fresh
        experts = self.new.moe.num_experts
        kept = self._gate_rows(spec.name)
        if kept is not None and kept.shape[1:] == fresh.shape[1:]:
            fresh[:experts] = np.repeat(kept, self.slices, axis=0)
        else:
            fresh[:experts] = np.repeat(fresh[: experts : self.slices], self.slices, axis=0)
        return fresh

    def _gate_rows(self, name: str) -> np.ndarray | None:
        """The rows of the source's router, one per expert; None if it had one expert, or no such rows."""
        old = self.old.moe
        has_rows = BY_NAME[old.router.name].config_class.has_gate_rows
        if old.num_experts == 1 or name not in self.stored or not has_rows:
            return None
        return self.stored[name][: old.num_experts]


def _plain_router(moe: MoEConfig) -> TopKConfig | None:
    """The router if every token reaches the k experts with the highest logits, otherwise None."""
    return moe.router if isinstance(moe.router, TopKConfig) and moe.capacity.policy == "dropless" else None


_ONLY = (
    "upcycling changes experts and routers (num_experts, expert_hidden, router, every, dense_layers, capacity of "
    "model.moe), and nothing else"
)
_CHANGED = {
    "num_experts",
    "expert_hidden",
    "router",
    "router_dtype",
    "capacity",
    "load_balance",
    "router_z_loss",
    "routed_scaling_factor",
    "every",
    "first_dense",
    "dense_layers",
    "allow_future_tokens",
}
"""Keys of `model.moe` that upcycling takes care of, or on which no output depends."""


def _others(model: ModelConfig) -> dict[str, Any]:
    """The settings that must stay, for a model to compute the same."""
    unused = dict.fromkeys(("dense_hidden", "init_std", "embedding_std", "output_z_loss"), True)
    exclude: Any = {"moe": _CHANGED, **unused}
    return model.model_dump(mode="json", exclude=exclude)


def _is_router(name: str) -> bool:
    return ".moe.router." in name
