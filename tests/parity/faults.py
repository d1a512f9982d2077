"""Faults, each put into one side of a comparison, and what the first line of the report must say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import cast
from unittest import mock

import numpy as np
import torch

import moeport.model.moe
import moeport.routers.topk
from moeport.backends.base import Backend
from moeport.backends.torch.ops import TorchOps
from moeport.backends.torch.optimizer import AdamW
from moeport.core.ops import CAUSAL
from moeport.parity.subject import Subject
from tests.support import with_methods


@dataclass(frozen=True)
class Fault:
    """One fault on PyTorch."""

    name: str
    says: str
    """What the first line of the report must contain."""
    change: Callable[[Subject], Subject] = lambda subject: subject
    """Puts it into the side that has it."""
    both: Callable[[Subject], Subject] = lambda subject: subject
    """Prepares both sides, so that it can show."""
    overrides: tuple[str, ...] = ()
    """Keys of the config that the faulty side has otherwise."""
    patch: Callable[[], object] = nullcontext
    """Code that the faulty side runs otherwise."""
    others: tuple[str, ...] = field(default=())
    """Further words of the first line."""


def faulty_ops(**methods: Callable) -> Callable[[Subject], Subject]:
    """Replace operations of a subject's backend; a method may ask `self.calls(name)` which call of the kind it is."""

    def change(subject: Subject) -> Subject:
        counts: dict[str, int] = {}

        def calls(self: TorchOps, name: str) -> int:
            counts[name] = counts.get(name, -1) + 1
            return counts[name]

        backend = copy.copy(subject.backend)
        backend.ops = with_methods(subject.backend.ops, "FaultyOps", calls=calls, **methods)
        return replace(subject, backend=backend)

    return change


def with_params(**changes: Callable[[np.ndarray], np.ndarray]) -> Callable[[Subject], Subject]:
    """Change weights; `__` in a name stands for a dot."""

    def change(subject: Subject) -> Subject:
        params = dict(subject.params)
        for name, fn in changes.items():
            dotted = name.replace("__", ".")
            params[dotted] = np.ascontiguousarray(fn(params[dotted]))
        return replace(subject, params=params)

    return change


def under_patch(subject: Subject, patch: Callable[[], object]) -> Subject:
    """A subject whose backend computes while a patch is in force."""
    return replace(subject, backend=cast(Backend, _Patched(subject.backend, patch)))


class _Patched:
    """Runs every call of an object, and of what its calls return, under a patch."""

    def __init__(self, inner, patch):
        self._inner, self._patch = inner, patch

    def __getattr__(self, name):
        value = getattr(self._inner, name)
        return _patched_call(value, self._patch) if callable(value) and name != "ops" else value


def _patched_call(fn, patch):
    def call(*args, **kwargs):
        with patch():
            out = fn(*args, **kwargs)
        if callable(out) or type(out).__name__ == "TorchTrainingModel":
            return _Patched(out, patch) if not callable(out) else _patched_call(out, patch)
        return out

    return call


def with_fault(fault: Fault, build: Callable[[tuple[str, ...]], Subject]) -> tuple[Subject, Subject]:
    """A, and B with the fault; `build` makes a subject with overrides of the config."""
    a, b = fault.both(build(())), replace(fault.change(fault.both(build(fault.overrides))), name="faulty")
    return a, b if fault.patch is nullcontext else under_patch(b, fault.patch)


# ---------------------------------------------------------------------- the faulty code


def transposed_in_the_second_layer(self, x, weight):
    """q and out are the square ones of a block."""
    if weight.shape == (32, 32) and self.calls("square") % 4 == 2:
        weight = weight.t()
    return TorchOps.linear(self, x, weight)


def eps_outside_the_root(self, x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight


def higher_index_first(self, x, k):
    experts = x.shape[-1]
    return experts - 1 - TorchOps.topk_ids(self, x.flip(-1), k)


def two_experts_exchanged(self, x_RD, w_in, w_out_EDF, counts_E, activation):
    order = [0, 2, 1, 3] if self.calls("grouped") % 2 else [0, 1, 2, 3]
    return TorchOps.grouped_mlp(self, x_RD, w_in[order], w_out_EDF[order], counts_E, activation)


def bfloat16_in_the_second_layer(self, q, k, v, options=CAUSAL):
    if not self.calls("attention") % 2:
        return TorchOps.attention(self, q, k, v, options)
    return TorchOps.attention(self, q.bfloat16(), k.bfloat16(), v.bfloat16(), options).float()


def base_of_another_model(self, x, cos, sin):
    angles = torch.outer(
        torch.arange(x.shape[1]), 1e6 ** (-torch.arange(0, x.shape[-1], 2).repeat(2) / x.shape[-1])
    ).to(x.dtype)
    return TorchOps.rope(self, x, angles.cos(), angles.sin())


def last_row_dropped(self, x_TD, plan):
    rows = TorchOps.permute(self, x_TD, plan)
    return torch.cat((rows[:-1], torch.zeros_like(rows[-1:])))


def heads_laid_out_otherwise(self, x, shape):
    """The queries of the second block: heads and their entries change places."""
    if len(shape) == 4 and x.shape[-1] == 32 and self.calls("heads") % 2:
        return TorchOps.reshape(self, x, shape).transpose(-1, -2).reshape(*shape)
    return TorchOps.reshape(self, x, shape)


@contextmanager
def no_gradient_of_the_auxiliary_loss() -> Iterator[None]:
    loss = moeport.model.moe.load_balance_loss

    def constant(ops, *args):
        return ops.stop_gradient(loss(ops, *args))

    with mock.patch.object(moeport.model.moe, "load_balance_loss", constant):
        yield


def gates_left_as_they_are():
    return mock.patch.object(moeport.routers.topk, "normalized", lambda ops, weight_TK: weight_TK)


@contextmanager
def no_bias_correction() -> Iterator[None]:
    """m / (sqrt(v) + eps) instead of the corrected moments."""

    @torch.no_grad()
    def step(self, learning_rate, norm):
        clip, config = self.config.clip_norm, self.config
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), clip, norm)
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                state = self.optimizer.state[p]
                first = state.setdefault("exp_avg", torch.zeros_like(p))
                second = state.setdefault("exp_avg_sq", torch.zeros_like(p))
                first.lerp_(p.grad, 1 - config.beta1)
                second.mul_(config.beta2).addcmul_(p.grad, p.grad, value=1 - config.beta2)
                p.mul_(1 - learning_rate * group["weight_decay"])
                p.sub_(learning_rate * first / (second.sqrt() + config.eps))
        self.optimizer.zero_grad(set_to_none=True)

    with mock.patch.object(AdamW, "step", step):
        yield


def exchange_experts(w: np.ndarray) -> np.ndarray:
    return w[[0, 2, 1, 3]]


def twin_experts(w: np.ndarray) -> np.ndarray:
    """Experts 1 and 2 always tie."""
    w = w.copy()
    w[2] = w[1]
    return w


FAULTS = [
    Fault(
        "transposed weight, in the checkpoint",
        "FAIL parameter layers.1.attention.q: the weights differ",
        with_params(layers__1__attention__q=np.transpose),
        others=("B is A transposed",),
    ),
    Fault(
        "transposed weight, in the product",
        "FAIL layers.1/attention.q:linear: first tensor beyond tolerance",
        faulty_ops(linear=transposed_in_the_second_layer),
        others=("its inputs agree (own error)",),
    ),
    Fault(
        "RMSNorm: eps outside the root",
        "FAIL layers.0/attention_norm:rms_norm: first tensor beyond tolerance",
        faulty_ops(rms_norm=eps_outside_the_root),
        others=("its inputs agree (own error)",),
    ),
    Fault(
        "no gradient of the auxiliary loss",
        "FAIL gradient of layers.1.moe.router.weight: the forward pass and the losses agree, this gradient does not",
        patch=no_gradient_of_the_auxiliary_loss,
    ),
    Fault(
        "tie broken the other way",
        "FAIL layers.0/moe.router:topk_ids: the scores agree, the choices do not follow from them: a tie is broken the "
        "other way",
        faulty_ops(topk_ids=higher_index_first),
        both=with_params(layers__0__moe__router__weight=twin_experts, layers__1__moe__router__weight=twin_experts),
    ),
    Fault(
        "two experts exchanged, in the checkpoint",
        "FAIL parameter layers.1.moe.experts.w_in: the weights differ",
        with_params(layers__1__moe__experts__w_in=exchange_experts, layers__1__moe__experts__w_out=exchange_experts),
        others=("rows 1, 2 of 4 differ: B has them swapped",),
    ),
    Fault(
        "two experts exchanged, in the kernel",
        "FAIL layers.1/moe.experts:grouped_mlp: first tensor beyond tolerance",
        faulty_ops(grouped_mlp=two_experts_exchanged),
        others=("its inputs agree (own error)",),
    ),
    Fault(
        "bfloat16 in one operation",
        "FAIL layers.1:attention: first tensor beyond tolerance",
        faulty_ops(attention=bfloat16_in_the_second_layer),
        others=("its inputs agree (own error)", "B has only the precision of bfloat16"),
    ),
    Fault(
        "gates not renormalised",
        "FAIL layers.0/moe.router:weight_N: first tensor beyond tolerance",
        patch=gates_left_as_they_are,
        others=("own error",),
    ),
    Fault(
        "AdamW without bias correction",
        "FAIL optimiser update of ",
        patch=no_bias_correction,
        others=("gradients agree, updates do not",),
    ),
    Fault(
        "heads laid out otherwise, between two operations",
        "FAIL layers.1/attention.q_norm:rms_norm.x: first tensor beyond tolerance",
        faulty_ops(reshape=heads_laid_out_otherwise),
        others=("between layers.1/attention.q:linear, which agrees, and layers.1/attention.q_norm:rms_norm",),
    ),
    Fault(
        "wrong RoPE base, in the config",
        "FAIL input rope:cos_SA: the inputs differ",
        overrides=("model.attention.rope_base=1000000.0",),
    ),
    Fault(
        "wrong RoPE base, in the kernel",
        "FAIL layers.0:rope: first tensor beyond tolerance",
        faulty_ops(rope=base_of_another_model),
        others=("its inputs agree (own error)",),
    ),
    Fault(
        "a row dropped between tokens and experts",
        "FAIL layers.0:permute: first tensor beyond tolerance",
        faulty_ops(permute=last_row_dropped),
        others=("row 63 of 64 differs: B has zeros there", "own error"),
    ),
]
"""On the subjects of `tests.parity.tiny`."""
