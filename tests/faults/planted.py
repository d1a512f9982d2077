"""The faults that are planted into one side of a comparison, one row each, and what the report must name.

`test_planted.py` compares each with the sound side and prints the table of docs/parity.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np

from moeport.parity.subject import Subject
from tests.faults import planted_ops as ops
from tests.faults import planted_patches as patches
from tests.parity import faults
from tests.parity.faults import faulty_ops, with_params


def unchanged(subject: Subject) -> Subject:
    """The subject itself."""
    return subject


@dataclass(frozen=True)
class Planted:
    """One fault."""

    group: str
    name: str
    says: str
    """A regular expression that the first line must match if the verdict is FAIL."""
    change: Callable[[Subject], Subject] = unchanged
    """Puts it into side B."""
    patch: Callable[[], AbstractContextManager] = nullcontext
    """Code that side B runs otherwise."""
    overrides: tuple[str, ...] = ()
    """Keys of the config that side B has otherwise."""
    both: Callable[[Subject], Subject] = unchanged
    """Prepares both sides, so that it can show."""
    base: tuple[str, ...] = ()
    """Keys of the config of both sides, or DIVIDED."""


# ---------------------------------------------------------------------- weights


def one_entry(w: np.ndarray) -> np.ndarray:
    w = w.copy()
    w.flat[-1] += 0.1
    return w


def one_nan(w: np.ndarray) -> np.ndarray:
    w = w.copy()
    w.flat[0] = math.nan
    return w


def one_transposed(w: np.ndarray) -> np.ndarray:
    w = w.copy()
    w[1] = w[1].T
    return w


def rounded(w: np.ndarray) -> np.ndarray:
    return (w.view(np.uint32) & 0xFFFF0000).view(np.float32)


def rolled(w: np.ndarray) -> np.ndarray:
    return np.roll(w, 1, 0)


def varied(w: np.ndarray) -> np.ndarray:
    return np.linspace(0.5, 1.5, w.size, dtype=np.float32)


def experts(fn: Callable[[np.ndarray], np.ndarray]) -> Callable[[Subject], Subject]:
    return with_params(layers__1__moe__experts__w_in=fn, layers__1__moe__experts__w_out=fn)


W_IN = "layers.1.moe.experts.w_in"
EXPERTS = rf"parameter {W_IN}: .*differ"
WEIGHTS = [
    ("one entry", rf"parameter {W_IN}", with_params(layers__1__moe__experts__w_in=one_entry)),
    ("a scale", "parameter layers.1.attention.v", with_params(layers__1__attention__v=lambda w: w * np.float32(1.001))),
    ("two experts swapped", EXPERTS, experts(faults.exchange_experts)),
    ("one expert transposed", EXPERTS, with_params(layers__1__moe__experts__w_in=one_transposed)),
    ("experts of the next shard", EXPERTS, experts(rolled)),
    ("router rows rolled", "parameter layers.0.moe.router", with_params(layers__0__moe__router__weight=rolled)),
    ("transposed projection", "parameter layers.1.attention.q", with_params(layers__1__attention__q=np.transpose)),
    ("vocabulary off by one", "parameter lm_head", with_params(lm_head__weight=rolled)),
    ("rounded to bfloat16", "parameter layers.0.attention.k", with_params(layers__0__attention__k=rounded)),
    ("a NaN", "parameter layers.1.attention.q", with_params(layers__1__attention__q=one_nan)),
    ("a NaN in the router", "parameter layers.0.moe.router", with_params(layers__0__moe__router__weight=one_nan)),
    ("a norm left at 1", "parameter final_norm", with_params(final_norm__weight=lambda w: w * np.float32(0.9))),
]  # fmt: skip

# ---------------------------------------------------------------------- operations

SECOND_NORM = with_params(layers__1__mlp_norm__weight=varied)
FIRST_NORM = r"layers\.0/attention_norm:rms_norm"
LATER_NORM = r"layers\.1/mlp_norm:rms_norm"
ROPE = r"layers\.0:rope"
ATTENTION = r"layers\.0:attention"
TOP_K = r"layers\.0/moe\.router:topk_ids"
EXPERT_MLP = r"layers\.0/moe\.experts:grouped_mlp"
LOSS = "linear_cross_entropy|model:cross_entropy|output_z|gradient of lm_head"
NEXT_LABEL = ops.with_targets(lambda t: t.roll(-1))
OTHER_LABEL = ops.with_targets(lambda t: t.clamp(min=100))
ONE_MORE = ops.masked_attention(lambda i, j: j <= i + 1)
ALL = ops.masked_attention(lambda i, j: j >= 0 * i)
DOCUMENTS = ops.masked_attention(lambda i, j: (j <= i) & (j // 8 == i // 8))
WINDOW = ops.masked_attention(lambda i, j: (j <= i) & (j > i - 4))
OPERATIONS: list[tuple[str, str, str, dict[str, Callable]]] = [
    ("norms", "no epsilon", FIRST_NORM, {"rms_norm": ops.no_eps}),
    ("norms", "epsilon outside the root", FIRST_NORM, {"rms_norm": faults.eps_outside_the_root}),
    ("norms", "another epsilon", FIRST_NORM, {"rms_norm": ops.large_eps}),
    ("norms", "missing", LATER_NORM, {"rms_norm": ops.no_norm}),
    ("norms", "over positions", LATER_NORM, {"rms_norm": ops.over_positions}),
    ("norms", "minus the mean", LATER_NORM, {"rms_norm": ops.minus_mean}),
    ("rope", "another base", ROPE, {"rope": faults.base_of_another_model}),
    ("rope", "off by one position", ROPE, {"rope": ops.one_position_late}),
    ("rope", "interleaved pairs", ROPE, {"rope": ops.interleaved}),
    ("rope", "the other direction", ROPE, {"rope": ops.other_direction}),
    ("rope", "keys not rotated", ROPE, {"rope": ops.keys_not_rotated}),
    ("masks", "off by one", ATTENTION, {"attention": ONE_MORE}),
    ("masks", "missing", ATTENTION, {"attention": ALL}),
    ("masks", "document boundary", ATTENTION, {"attention": DOCUMENTS}),
    ("masks", "a window", ATTENTION, {"attention": WINDOW}),
    ("masks", "scores not scaled", ATTENTION, {"attention": ops.unscaled_attention}),
    ("gates", "second choice is the third", TOP_K, {"topk_ids": ops.third_in_place_of_second}),
    ("gates", "the smallest scores", TOP_K, {"topk_ids": ops.smallest}),
    ("gates", "of the wrong choice", r"router:(take_last|weight_N)", {"take_last": ops.gates_of_the_wrong_choice}),
    ("gates", "softmax in bfloat16", r"layers\.0/moe\.router:softmax", {"softmax": ops.softmax_in_bfloat16}),
    ("dispatch", "a row dropped", r"layers\.0:permute", {"permute": faults.last_row_dropped}),
    ("dispatch", "two rows swapped", r"layers\.0:permute", {"permute": ops.rows_swapped}),
    ("dispatch", "rows of another token", r"layers\.0:permute", {"permute": ops.rows_of_another_token}),
    ("dispatch", "a row to the next expert", EXPERT_MLP, {"grouped_mlp": ops.one_row_to_the_next_expert}),
    ("dispatch", "two experts exchanged", r"layers\.1/.*grouped_mlp", {"grouped_mlp": faults.two_experts_exchanged}),
    ("dispatch", "gate and up exchanged", EXPERT_MLP, {"grouped_mlp": ops.gate_and_up_exchanged}),
    ("dispatch", "combined without gates", r"layers\.0:unpermute", {"unpermute": ops.gates_forgotten}),
    ("dispatch", "combined with another gate", r"layers\.0:unpermute", {"unpermute": ops.gate_of_another_assignment}),
    ("dtype", "router in bfloat16", r"layers\.0/moe\.router:linear", {"linear": ops.router_in_bfloat16}),
    ("dtype", "sums in bfloat16", r"layers\.0/attention\.q:linear", {"linear": ops.bfloat16_sums}),
    ("dtype", "logits in bfloat16", LOSS, {"linear_cross_entropy": ops.logits_in_bfloat16}),
    ("dtype", "attention in bfloat16", r"layers\.1:attention", {"attention": faults.bfloat16_in_the_second_layer}),
    ("losses", "no output z-loss", LOSS, {"linear_cross_entropy": ops.no_output_z_loss}),
    ("losses", "sum in place of mean", "linear_cross_entropy", {"linear_cross_entropy": ops.sum_in_place_of_mean}),
    ("data", "labels shifted once more", LOSS, {"linear_cross_entropy": NEXT_LABEL}),
    ("data", "one label masked", LOSS, {"linear_cross_entropy": OTHER_LABEL}),
    ("NaN", "in an activation", r"layers\.0/attention\.v:linear", {"linear": ops.nan_values}),
    ("NaN", "in the loss", "linear_cross_entropy", ops.nan_from("linear_cross_entropy", 0)),
    ("NaN", "in step 3", "NaN|step 3", ops.nan_from("linear", 31)),
]  # fmt: skip

# ---------------------------------------------------------------------- everything else

CAPACITY = ("model.moe.capacity.policy=factor", "model.moe.capacity.factor=0.75")
WARM_UP = ("optimizer.schedule.warmup_steps=4",)
DIVIDED = ("micro-batches",)
"""Marks a batch in two micro-batches, as two ranks compute it."""
BIASED = ("model.moe.router.name=sigmoid_bias",)
SERVED = "served|where|take_rows|weight_N|condition"
TOTAL = "model:loss|gradient"
ROTATED = patches.tokens(lambda ids: np.roll(ids, -1, 1), False)
LOST = patches.around_step(before=patches.one_expert_without_gradient)
STEPS = "optimiser|optimizer|step|moment"
PATCHES: list[tuple[str, str, str, Callable[[], AbstractContextManager], tuple[str, ...]]] = [
    ("gates", "not normalised", r"layers\.0/moe\.router:weight_N", faults.gates_left_as_they_are, ()),
    ("losses", "auxiliary loss without its coefficient", TOTAL, patches.auxiliary_loss_times(100.0), ()),
    ("losses", "no auxiliary loss", TOTAL, patches.auxiliary_loss_times(0.0), ()),
    ("losses", "auxiliary loss is constant", r"gradient of layers\.1", faults.no_gradient_of_the_auxiliary_loss, ()),
    ("losses", "balance per sequence", "load_balance|:mean", patches.balance_per_sequence, ()),
    ("losses", "balance not times experts", "load_balance", patches.balance_not_times_experts, ()),
    ("losses", "no router z-loss", "router_z", patches.no_z_loss, ()),
    ("dispatch", "capacity off by one", SERVED, patches.capacity_plus_one, CAPACITY),
    ("dispatch", "the last tokens are served first", SERVED, patches.last_come_first_served, CAPACITY),
    ("optimiser", "beta1", STEPS, patches.optimizer_with(beta1=0.95), ()),
    ("optimiser", "beta2", STEPS, patches.optimizer_with(beta2=0.999), ()),
    ("optimiser", "epsilon", STEPS, patches.optimizer_with(eps=1e-3), ()),
    ("optimiser", "no decay", STEPS, patches.optimizer_with(weight_decay=0.0), ()),
    ("optimiser", "decay on norms", STEPS, patches.decay_on_norms, ()),
    ("optimiser", "decay in the gradient", STEPS, patches.around_step(before=patches.decay_in_the_gradient), ()),
    ("optimiser", "learning rate", STEPS, patches.around_step(rate=1.1), ()),
    ("optimiser", "no clipping", STEPS, patches.optimizer_with(clip_norm=None), ()),
    ("optimiser", "clipping at another norm", STEPS, patches.optimizer_with(clip_norm=0.5), ()),
    ("optimiser", "no bias correction", STEPS, faults.no_bias_correction, ()),
    ("optimiser", "schedule off by one", STEPS, patches.next_rate, WARM_UP),
    ("optimiser", "moments forgotten", STEPS, patches.around_step(before=patches.forget_moments), ()),
    ("dtype", "moments in bfloat16", STEPS, patches.around_step(after=patches.round_moments), ()),
    ("dtype", "weights in bfloat16", STEPS, patches.around_step(after=patches.round_weights), ()),
    ("router state", "bias not moved", STEPS + "|state|bias", patches.bias_not_moved, BIASED),
    ("router state", "bias moved the other way", STEPS + "|state|bias", patches.bias_moved_the_other_way, BIASED),
    ("data", "order of the batch", "input batch:token_BS", patches.sequences(lambda ids: ids[::-1]), ()),
    ("data", "another batch", "input batch:token_BS", patches.sequences(lambda ids: ids, lambda step: step + 1), ()),
    ("data", "the same batch again", STEPS, patches.sequences(lambda ids: ids, lambda step: 0), ()),
    ("data", "another tokenizer", "input batch:token_BS", patches.tokens(lambda ids: (ids + 1) % 256), ()),
    ("data", "inputs are the labels", "input batch:token_BS", ROTATED, ()),
    ("ranks", "gradients not divided", "step", patches.share_of_one, DIVIDED),
    ("ranks", "one part counted twice", "step", patches.last_micro_batch_twice, DIVIDED),
    ("ranks", "experts' gradients divided twice", "experts.*step", patches.gradients_of(".experts.", 0.5), DIVIDED),
    ("ranks", "gradients 8 times as large", "in the optimiser step", patches.gradients_of("", 8.0), ()),
    ("ranks", "one expert's gradient lost", STEPS, LOST, ()),
    ("NaN", "in a gradient", "NaN|infinity", patches.gradients_of("router", math.inf), ()),
    ("NaN", "in an update", "NaN|infinity", patches.nan_in_a_weight_after_step_1, ()),
]  # fmt: skip
CONFIGS: list[tuple[str, str, str, tuple[str, ...]]] = [
    ("norms", "epsilon, in the config", FIRST_NORM, ("model.norm_eps=1e-3",)),
    ("rope", "base, in the config", "input rope", ("model.attention.rope_base=1000000.0",)),
    ("gates", "softmax after top-k, in the config", "softmax|weight_N|take_last", ("model.moe.router.softmax=after",)),
    ("losses", "no router z-loss, in the config", "router_z|model:loss|gradient|only", ("model.moe.router_z_loss=0",)),
    ("optimiser", "beta2, in the config", STEPS, ("optimizer.beta2=0.999",)),
    ("optimiser", "clipping that does not bite, in the config", STEPS, ("optimizer.clip_norm=1000",)),
]

PLANTED = [
    *(Planted("weights", name, says, change) for name, says, change in WEIGHTS),
    Planted("norms", "its weight forgotten", LATER_NORM, faulty_ops(rms_norm=ops.without_weight), both=SECOND_NORM),
    *(Planted(group, name, says, faulty_ops(**methods)) for group, name, says, methods in OPERATIONS),
    Planted(
        "gates",
        "ties broken the other way",
        TOP_K,
        faulty_ops(topk_ids=faults.higher_index_first),
        both=with_params(layers__0__moe__router__weight=faults.twin_experts),
    ),
    *(Planted(group, name, says, patch=patch, base=base) for group, name, says, patch, base in PATCHES),
    *(Planted(group, name, says, overrides=overrides) for group, name, says, overrides in CONFIGS),
]  # fmt: skip
"""On the subjects of `tests.parity.tiny`."""
