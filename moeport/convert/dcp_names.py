"""The names of the tensors in a DCP folder, and which part of which of our arrays each one is."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from typing_extensions import override

from moeport.config.model import ModelConfig
from moeport.config.schema import Config
from moeport.convert.config_out import differences, keys_of
from moeport.convert.family import family_of
from moeport.core.moments import MOMENTS
from moeport.core.parameters import ParameterSpec
from moeport.core.weights import Box, Weights, dtype_of, read_part
from moeport.errors import UserError
from moeport.model.decoder import DecoderLM

Names = Literal["moeport", "torchtitan"]
"""Ours below `model.` and `optim.state.`, or those of torchtitan's Qwen3 and Qwen3-MoE."""

PREFIXES: dict[Names, tuple[str, str]] = {"moeport": ("model.", "optim.state."), "torchtitan": ("", "optimizer.state.")}
"""What stands before the name of a parameter, and before that of its moments."""
ASIDE: dict[Names, tuple[str, ...]] = {
    "moeport": ("optim.", "optimizer."),
    "torchtitan": ("optimizer.", "lr_scheduler.", "dataloader.", "train_state."),
}
"""How the names of entries begin that belong to a run of another program, but not to its model."""
STATES = sorted((*MOMENTS["adamw"], *MOMENTS["muon"]))
"""Kinds of moments, which follow the name of their parameter and have its shape."""

EMBEDDING, TITAN_EMBEDDING = "embedding.weight", "tok_embeddings.weight"
TITAN_ATTENTION = {
    "q": "qkv_linear.wq.weight",
    "k": "qkv_linear.wk.weight",
    "v": "qkv_linear.wv.weight",
    "out": "wo.weight",
    "q_norm": "q_norm.weight",
    "k_norm": "k_norm.weight",
}
"""torchtitan's name of each parameter of attention (torchtitan/models/qwen3/state_dict_adapter.py)."""
TITAN_EXPERTS = "moe.routed_experts.inner_experts"
TITAN_BIAS = "moe.expert_bias_E"
"""A buffer that shifts the choice of experts; zeros have no effect."""


@dataclass(frozen=True)
class Piece:
    """A stored tensor, which is a rectangular part of one of our parameters."""

    tensor: str
    shape: tuple[int, ...]
    parameter: str
    box: Box
    """The part, which may have dimensions of 1 before those of the tensor."""

    def ours(self, box: Box) -> Box:
        """The part of our parameter that a part of the tensor is."""
        extra = len(self.box.shape) - len(self.shape)
        start = (0,) * extra + box.start
        shape = (1,) * extra + box.shape
        return Box(tuple(a + b for a, b in zip(self.box.start, start, strict=True)), shape)

    def theirs(self, box: Box) -> Box:
        """The part of the tensor that a part of our parameter is, which must be within `self.box`."""
        extra = len(self.box.shape) - len(self.shape)
        inner = box.within(self.box)
        return Box(inner.start[extra:], inner.shape[extra:])


def specs_of(config: Config, rows: int, place: str) -> Sequence[ParameterSpec]:
    """The parameters of a config's model; `rows` are those of its embedding. Raises UserError for one of images."""
    if config.data.is_images:
        raise UserError(f"{place}: was trained to classify images; expected a language model")
    return DecoderLM(config.model, config.model.vocab_size or rows).parameter_specs()


def names_in(stored: Weights, record: Mapping[str, Any] | None) -> tuple[Names, str, str]:
    """Whose names they are, what stands before those of parameters, and before those of their moments."""
    names: Names = "torchtitan" if TITAN_EMBEDDING in stored else "moeport"
    if record is not None:
        names = record["names"]
    prefix, state = PREFIXES[names]
    if names == "moeport" and EMBEDDING in stored:
        prefix = ""
    return names, prefix, state


def pieces_of(names: Names, model: ModelConfig, specs: Sequence[ParameterSpec]) -> list[Piece]:
    """All tensors of a model's parameters, which cover each parameter exactly once.

    Args:
        names: whose names they have.
        model: the `model` section.
        specs: its parameters.

    Raises UserError if the model has something that has no name there.
    """
    if names == "moeport":
        return [Piece(spec.name, spec.shape, spec.name, Box.whole(spec.shape)) for spec in specs]
    shapes = {spec.name: spec.shape for spec in specs}
    _check_titan(model, shapes[EMBEDDING][0])
    is_dense = model.moe.num_experts == 1
    skipped = {name for name in shapes if is_dense and name.endswith("moe.router.weight")}
    return [piece for name, shape in shapes.items() if name not in skipped for piece in _titan(name, shape)]


def _check_titan(model: ModelConfig, vocab_size: int) -> None:
    family = family_of("qwen3" if model.moe.num_experts == 1 else "qwen3_moe")
    lacking = differences(family, model, vocab_size, keys_of(family, model, vocab_size, 1))
    if lacking:
        raise UserError(
            f"torchtitan's {family.model_type} cannot express this model: {'; '.join(map(str, lacking))}. "
            "Use --names moeport"
        )


def _titan(name: str, shape: tuple[int, ...]) -> Iterator[Piece]:
    """torchtitan's tensors of one of our parameters."""
    if not name.startswith("layers."):
        known = {EMBEDDING: TITAN_EMBEDDING, "final_norm.weight": "norm.weight"}
        yield Piece(known.get(name, name), shape, name, Box.whole(shape))
        return
    _, layer, part = name.split(".", 2)
    block, _, last = part.rpartition(".")
    if block == "attention":
        theirs = f"attention.{TITAN_ATTENTION[last]}"
    elif block == "moe.experts" and shape[0] > 1:
        yield from _halves(f"layers.{layer}.{TITAN_EXPERTS}", last, name, shape, ("w1_EFD", "w3_EFD", "w2_EDF"))
        return
    elif block in ("moe.experts", "mlp"):
        suffixes = ("w1.weight", "w3.weight", "w2.weight")
        yield from _halves(f"layers.{layer}.feed_forward", last, name, shape, suffixes)
        return
    else:
        theirs = {"mlp_norm.weight": "ffn_norm.weight", "moe.router.weight": "moe.router.gate.weight"}.get(part, part)
    yield Piece(f"layers.{layer}.{theirs}", shape, name, Box.whole(shape))


def _halves(block: str, last: str, name: str, shape: tuple[int, ...], suffixes: Sequence[str]) -> Iterator[Piece]:
    """The gate and the up projection, which our `w_in` has one above the other, or the projection down."""
    gate, up, down = suffixes
    dim = len(shape) - 2
    drop = 1 if len(shape) == 3 and shape[0] == 1 else 0  # a dense block as a mixture of one expert
    if last == "w_out":
        yield Piece(f"{block}.{down}", shape[drop:], name, Box.whole(shape))
        return
    half = shape[dim] // 2
    for number, suffix in enumerate((gate, up)):
        start = tuple(number * half if d == dim else 0 for d in range(len(shape)))
        box = Box(start, (*shape[:dim], half, *shape[dim + 1 :]))
        yield Piece(f"{block}.{suffix}", box.shape[drop:], name, box)


class Theirs(Weights):
    """Our arrays by their names, cut as they have them, with a count of steps beside each parameter's moments.

    Args:
        pieces: the tensors of the parameters.
        names: what stands before and behind their names.
        model: our parameters.
        optimizer: our moments.
        steps: the number of times that the parameters were updated.
    """

    def __init__(
        self,
        pieces: Iterable[Piece],
        names: Names,
        model: Mapping[str, np.ndarray],
        optimizer: Mapping[str, np.ndarray],
        steps: int,
    ):
        before, state = PREFIXES[names]
        self._entries: dict[str, tuple[Piece, Mapping[str, np.ndarray], str]] = {}
        self._counts: dict[str, np.ndarray] = {}
        for piece in pieces:
            self._entries[before + piece.tensor] = piece, model, piece.parameter
            for moment in STATES:
                own = f"{moment}.{piece.parameter}"
                if own in optimizer:
                    self._entries[f"{state}{piece.tensor}.{moment}"] = piece, optimizer, own
                    self._counts[f"{state}{piece.tensor}.step"] = np.array(steps, np.float32)

    @property
    def has_moments(self) -> bool:
        """Whether there are any that have the shapes of their parameters."""
        return bool(self._counts)

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        return () if name in self._counts else self._entries[name][0].shape

    @override
    def dtype(self, name: str) -> str:
        if name in self._counts:
            return "float32"
        _, arrays, own = self._entries[name]
        return dtype_of(arrays, own)

    @override
    def read(self, name: str, box: Box) -> np.ndarray:
        if name in self._counts:
            return self._counts[name]
        piece, arrays, own = self._entries[name]
        return read_part(arrays, own, piece.ours(box)).reshape(box.shape)

    @property
    @override
    def names(self) -> Collection[str]:
        return [*self._entries, *self._counts]


class Ours(Weights):
    """Their tensors by our names, put together from their pieces.

    Args:
        pieces: what the arrays are made of; `tensor` is the whole name in `stored`.
        stored: their tensors.
    """

    def __init__(self, pieces: Iterable[Piece], stored: Weights):
        self.stored = stored
        self.pieces: dict[str, list[Piece]] = {}
        for piece in pieces:
            self.pieces.setdefault(piece.parameter, []).append(piece)

    @override
    def shape(self, name: str) -> tuple[int, ...]:
        boxes = [piece.box for piece in self.pieces[name]]
        ends = zip(*(tuple(a + b for a, b in zip(box.start, box.shape, strict=True)) for box in boxes), strict=True)
        return tuple(map(max, ends)) if boxes[0].shape else ()

    @override
    def dtype(self, name: str) -> str:
        found = {self.stored.dtype(piece.tensor) for piece in self.pieces[name]}
        return "float64" if "float64" in found else "float32"

    @override
    def read(self, name: str, box: Box) -> np.ndarray:
        values = np.empty(box.shape, self.dtype(name))
        for piece in self.pieces[name]:
            if common := piece.box.intersection(box):
                part = self.stored.read(piece.tensor, piece.theirs(common))
                values[common.within(box).slices] = part.reshape(common.shape)
        return values

    @property
    @override
    def names(self) -> Collection[str]:
        return self.pieces


def check_shapes(pieces: Iterable[Piece], stored: Weights, place: str) -> None:
    """Refuse tensors that are missing or have another shape. Raises UserError, which names the first."""
    for piece in pieces:
        if piece.tensor not in stored:
            raise UserError(f"{place}: {piece.tensor} is missing; expected it, with the shape {piece.shape}")
        if (found := stored.shape(piece.tensor)) != piece.shape:
            raise UserError(f"{place}: {piece.tensor} has the shape {found}, expected {piece.shape}")
        if not stored.dtype(piece.tensor).startswith("float"):
            raise UserError(f"{place}: {piece.tensor} has the type {stored.dtype(piece.tensor)}, expected a float")
