"""Memory of a rank: an estimate, with its formulas beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moeport.comm.communicator import ITEM_BYTES
from moeport.config.model import ModelConfig
from moeport.config.schema import Config
from moeport.core.moments import moment_names
from moeport.core.parameters import ParameterSpec
from moeport.facts import BACKENDS, Sharded
from moeport.model.build import build_model


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parameters: float
    gradients: float
    moments: float
    """Of the optimiser: two for each parameter of AdamW's, one for each of Muon's; of a matrix of Adafactor's, one for
    each row and column."""
    gathered: float
    """Whole parameters and gradients of the largest block, and of what is outside blocks, where FSDP gathers them."""
    cast: float
    """Weights that are cast to the compute type once per update."""
    activations: float
    """An estimate, see `activation_bytes`, `padded_rows` and `rotary_bytes`."""
    saved: float
    """On the host: a copy of what a rank writes to a checkpoint, while it is written."""
    program: float
    """On the host: the interpreter and the framework."""

    @property
    def held(self) -> float:
        """What there must be room for in every step, whatever else is needed."""
        return self.parameters + self.gradients + self.moments

    @property
    def total(self) -> float:
        """On the device."""
        return self.held + self.gathered + self.cast + self.activations

    def on_host(self, computes_there: bool) -> float:
        """On the host, where a CPU computes everything and an accelerator nothing."""
        return self.saved + self.program + (self.total if computes_there else 0.0)


@dataclass(frozen=True)
class ModelSizes:
    """Trained parameters of a model, and bytes of what is made of them."""

    dense_total: int
    """All but the routed experts'."""
    expert_total: int
    dense_outside: int
    """Of embedding, head and last norm, which no block holds."""
    dense_block: int
    """Of the largest block."""
    expert_block: int
    dense_moments: int
    """Numbers that the optimiser keeps of the dense parameters."""
    expert_moments: int
    parameter_bytes: int
    """Of a parameter, a gradient or a moment."""
    item_bytes: int
    """Of a number in the compute type."""
    row_bytes: int
    """Of one token in the compute type."""
    dense_cast: int
    """Numbers of the dense parameters that are cast to the compute type once per update."""
    expert_cast: int
    sharded: tuple[Sharded, ...]
    """What ranks that hold copies divide."""

    @classmethod
    def of(cls, config: Config, vocab_size: int) -> ModelSizes:
        """Counted from the shapes of the model. Compute type `auto` counts as bfloat16."""
        return cls.of_specs(config, build_model(config.model, config.data, vocab_size).parameter_specs())

    @classmethod
    def of_specs(cls, config: Config, specs: Sequence[ParameterSpec]) -> ModelSizes:
        """Those of a model with these parameters."""
        blocks: dict[tuple[str, bool], int] = {}
        totals, moments, cast = {True: 0, False: 0}, {True: 0, False: 0}, {True: 0, False: 0}
        dtype = config.backend.dtype
        item_bytes = 2 if dtype == "auto" else ITEM_BYTES[dtype]
        for spec in moment_names(specs, config.optimizer.name).values():
            moments[spec.is_expert] += spec.size
        for spec in specs:
            if spec.trainable:
                totals[spec.is_expert] += spec.size
                cast[spec.is_expert] += spec.size * (spec.in_compute_type and item_bytes < 4)
                if spec.name.startswith("layers."):
                    key = spec.name.split(".")[1], spec.is_expert
                    blocks[key] = blocks.get(key, 0) + spec.size
        return cls(
            dense_total=totals[False],
            expert_total=totals[True],
            dense_outside=totals[False] - sum(size for (_, is_expert), size in blocks.items() if not is_expert),
            dense_block=max(size for (_, is_expert), size in blocks.items() if not is_expert),
            expert_block=max((size for (_, is_expert), size in blocks.items() if is_expert), default=0),
            dense_moments=moments[False],
            expert_moments=moments[True],
            parameter_bytes=8 if dtype == "float64" else 4,
            item_bytes=item_bytes,
            row_bytes=config.model.d_model * item_bytes,
            dense_cast=cast[False],
            expert_cast=cast[True],
            sharded=() if config.parallelism.shard is False else BACKENDS[config.backend.name].shards,
        )


def memory(config: Config, sizes: ModelSizes, ranks: int, expert: int, tokens: int) -> Memory:
    """Bytes of one rank: parameters, gradients and the optimiser's moments in the parameters' type, and activations.

    Args:
        config: the whole config.
        sizes: of its model.
        ranks: number of ranks.
        expert: number of ranks that share one copy of the experts.
        tokens: of a rank's micro-batch.
    """
    facts = BACKENDS[config.backend.name]
    divided = set(sizes.sharded)
    if "parameters" in facts.shards and config.training.gradient_accumulation > 1:
        divided.discard("gradients")  # FSDP keeps them whole until the last micro-batch

    def held(kind: Sharded, dense: int, experts: int) -> float:
        dense_copies, expert_copies = (ranks, ranks // expert) if kind in divided else (1, 1)
        return sizes.parameter_bytes * (dense / dense_copies + experts / expert / expert_copies)

    parameters = held("parameters", sizes.dense_total, sizes.expert_total)
    gradients = held("gradients", sizes.dense_total, sizes.expert_total)
    moments = held("moments", sizes.dense_moments, sizes.expert_moments)
    gathers = "parameters" in facts.shards and ranks > 1  # FSDP does so with parallelism.shard: false too
    gathers_experts = gathers and ranks > expert
    gathered = sizes.dense_outside + sizes.dense_block + gathers_experts * sizes.expert_block / expert
    cast = (not gathers) * sizes.dense_cast + (not gathers_experts) * sizes.expert_cast / expert
    everything = sizes.dense_total + sizes.expert_total + sizes.dense_moments + sizes.expert_moments
    activations = activation_bytes(config, sizes.item_bytes) * tokens + rotary_bytes(config, tokens)
    return Memory(
        parameters=parameters,
        gradients=gradients,
        moments=moments,
        gathered=2.0 * sizes.parameter_bytes * gathered if gathers else 0.0,
        cast=sizes.item_bytes * cast if facts.casts_once else 0.0,
        activations=activations + padded_rows(config, expert, tokens) * row_bytes(config, sizes.item_bytes),
        saved=sizes.parameter_bytes * everything / ranks,
        program=facts.program_bytes,
    )


def padded_rows(config: Config, expert: int, tokens: int) -> float:
    """Rows of a rank's experts in all layers that are kept for the backward pass and hold no assignment.

    Policy `round` fills half a tile per expert on average where it does not drop. Graphs with as many rows for each
    expert begin with twice the mean, or have the capacity.
    """
    moe, facts = config.model.moe, BACKENDS[config.backend.name]
    assignments = tokens * moe.router.experts_per_token
    rows = 0.0
    if moe.capacity.policy == "round":
        rows = moe.capacity.tile / 2 * moe.num_experts / expert
    if facts.pads_rows and config.backend.compile is not False and expert == 1 and not moe.router.fixed_load:
        rows = assignments * max(0.0, (moe.capacity.factor if moe.capacity.has_limit else 2.0) - 1)
    layers = 1 if config.training.activation_checkpointing else len(config.model.moe_layers)
    return rows * layers * moe.router.sub_layers


def row_bytes(config: Config, item_bytes: int) -> float:
    """Bytes that an expert keeps of a row: the row in and out, and hidden values."""
    moe = config.model.moe
    return float(item_bytes * (2 * config.model.d_model + (3 if moe.activation == "swiglu" else 2) * moe.expert_hidden))


def activation_bytes(config: Config, item_bytes: int) -> float:
    """Bytes that a token leaves for the backward pass; an estimate.

    A block keeps its input and both normed ones (3 D), queries, keys and values before and after the rotation and the
    attention's output, latent vectors before and after their norm, and for each expert of the token, shared ones too,
    its row (2 D: in and out) and hidden values (3 F of SwiGLU, 2 F of GELU). A dense block that follows the experts
    adds its input and the normed one (2 D). With checkpointing a block keeps its input, and one block all.
    """
    model, moe = config.model, config.model.moe
    hidden = 3 if moe.activation == "swiglu" else 2
    experts = moe.router.experts_per_token + moe.num_shared_experts
    widths = moe.router.experts_per_token * moe.expert_hidden + moe.shared_width
    per_moe = moe.router.sub_layers * (experts * 2 * model.d_model + hidden * widths) + hidden * moe.residual_hidden
    per_moe += 2 * model.d_model * moe.router.sub_layers * moe.dense_follows
    per_dense = 2 * model.d_model + hidden * model.dense_width
    moe_layers, layers = len(model.moe_layers), model.num_layers
    block = 3 * model.d_model + _attention_numbers(model)
    total = layers * block + moe_layers * per_moe + (layers - moe_layers) * per_dense
    if config.training.activation_checkpointing:
        total = layers * model.d_model + block + max(per_moe, per_dense)
    return float(item_bytes * total)


def rotary_bytes(config: Config, tokens: int) -> float:
    """Bytes of the rotary tables with a base per key-value head; those of one base are small.

    Cosine and sine of every position and key-value head, and of every token again where documents are masked.
    """
    model, data = config.model, config.data
    if model.attention.rope_bases.kind == "none":
        return 0.0
    rows = data.tokens_per_sequence + tokens * (not data.is_images and data.document_mask)
    return float(2 * (8 if config.backend.dtype == "float64" else 4) * rows * model.num_kv_heads * model.rope_dim)


def _attention_numbers(model: ModelConfig) -> int:
    """Numbers that a block's attention keeps of a token."""
    attention, heads = model.attention, model.num_heads
    if attention.kind == "grouped":
        return model.head_dim * (3 * heads + 4 * model.num_kv_heads)
    latents = 2 * ((attention.q_lora_rank or 0) + attention.kv_lora_rank) + attention.qk_rope_head_dim
    return latents + heads * (4 * model.head_dim + 3 * attention.v_head_dim)


LABELS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "moments": "moments",
    "gathered": "gathered weights",
    "cast": "cast weights",
    "activations": "activations",
}
"""What is on the device, as messages call it."""


def memory_text(memory: Memory) -> str:
    """The parts of what a rank needs on its device, and their sum."""
    parts = [f"{label} {gib(getattr(memory, name))}" for name, label in LABELS.items() if getattr(memory, name)]
    return f"about {gib(memory.total)} ({', '.join(parts)})"


def fits(need: float, has: float, place: str) -> str:
    """How much of a place is needed, and whether that fits."""
    if math.isinf(has):
        return f"{gib(need)}; the {place} does not say what it has"
    return f"{gib(need)} of {gib(has)}, {'fits' if need <= has else f'does not fit the {place}'}"


def gib(size: float) -> str:
    """Bytes for readers."""
    return f"{size / 2**30:,.1f} GiB" if size >= 0.95 * 2**30 else f"{size / 2**20:,.1f} MiB"
