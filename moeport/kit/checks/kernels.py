"""The kernels that a backend chooses against compositions of primitives, on sizes of a small model.

Where a kernel is fused, it is also timed as `backend.kernels: default` computes it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moeport.backends.base import Backend
from moeport.conformance.case import dispatch_plan, place
from moeport.conformance.forms import with_default_kernels
from moeport.core.array import Array
from moeport.core.dispatch_plan import DispatchPlan
from moeport.core.ops import KERNELS, Ops
from moeport.kit.result import Outcome, Result, judgement
from moeport.kit.task import Task, describe
from moeport.model.rope import rope_tables
from moeport.pages.tables import Table

LIMITS = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 3e-2}
"""Relative RMS difference of two ways to compute the same; conformance holds each to its formula more closely."""
SECONDS = 0.3
"""About the time that one kernel is timed for."""
REPETITIONS = 20
"""Most passes that are timed."""
ENOUGH_SECONDS = 0.02
"""A pass that takes less is measured again on larger sizes."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of the arrays."""

    tokens: int
    width: int
    hidden: int
    heads: int
    experts: int
    vocab: int

    @property
    def head_width(self) -> int:
        """A."""
        return self.width // self.heads


SCALES = (Sizes(256, 64, 64, 2, 8, 512), Sizes(2048, 512, 256, 8, 16, 8192), Sizes(8192, 1024, 512, 8, 32, 32768))
"""From the smallest; larger ones follow where these take no time."""
CHOICES = 2
"""Experts per token."""

Call = Callable[[Ops, Mapping[str, Array]], Any]
Inputs = Mapping[str, np.ndarray]


def work(task: Task) -> dict[str, Any]:
    """Every kernel in every type, each noted as soon as it is known."""
    types = [dtype for dtype in task.dtypes if dtype != "float64"] or list(task.dtypes)
    labels = [f"{dtype} {kernel}" for dtype in types for kernel in KERNELS]
    backends: dict[str, tuple[Backend, Backend]] = {}
    scales = SCALES[:1] if task.quick else SCALES
    for label in task.remaining(labels):
        dtype, kernel = label.split()
        if dtype not in backends:
            backends[dtype] = task.open(dtype), task.open(dtype, kernels="default")
        backend, plain = backends[dtype]
        with task.case(label) as found:
            choice = backend.kernel_choices()[kernel]
            found |= {"dtype": dtype, "kernel": kernel, "choice": choice}
            sides = {"chosen": backend.ops, "composed": with_default_kernels(backend.ops)}
            if backend.fused_kernels().get(kernel) != plain.fused_kernels().get(kernel):
                sides["default"] = plain.ops
            try:
                found |= _compare_scales(backend, kernel, sides, scales)
            except Exception as error:
                found["problem"] = describe(error)
    return {"cases": len(labels)}


def _compare_scales(backend: Backend, kernel: str, sides: Mapping[str, Ops], scales: Sequence[Sizes]) -> dict[str, Any]:
    """The comparison at the first scale that takes a while, or else the last."""
    found: dict[str, Any] = {}
    for sizes in scales:
        found = _compare(backend, kernel, sides, sizes)
        if found["chosen_s"] > ENOUGH_SECONDS:
            break
    return found


def _compare(backend: Backend, kernel: str, sides: Mapping[str, Ops], sizes: Sizes) -> dict[str, Any]:
    """Values and gradients of the chosen kernel against the composed one, and the times of all sides."""
    inputs, call = workload(kernel, sizes)
    results, seconds = {}, {}
    for name, ops in sides.items():
        results[name], seconds[f"{name}_s"] = _measure(backend, ops, inputs, call)
    errors = [relative_error(a, b) for a, b in zip(results["chosen"][0], results["composed"][0], strict=True)]
    gradients = {
        name: relative_error(gradient, results["composed"][1][name]) for name, gradient in results["chosen"][1].items()
    }
    return {"tokens": sizes.tokens, "values": max(errors), "gradients": gradients, **seconds}


def _measure(
    backend: Backend, ops: Ops, inputs: Inputs, call: Call
) -> tuple[tuple[list[np.ndarray], dict[str, np.ndarray]], float]:
    """Outputs and gradients, and the median seconds of a forward and backward pass."""
    fixed, params = _placed(backend, inputs)
    weights: list[Array] = []

    def loss(params: Mapping[str, Array]) -> tuple[Array, list[Array]]:
        out = call(ops, {**fixed, **params})
        outputs = list(out) if isinstance(out, tuple | list) else [out]
        if not weights:
            weights.extend(_weight(backend, x) for x in outputs)
        total = [ops.sum(x * w) for x, w in zip(outputs, weights, strict=True)]
        return sum(total[1:], total[0]), outputs

    run = backend.value_and_grad(loss, has_aux=True)
    (_, outputs), gradients = run(params)
    found = [ops.to_numpy(x) for x in outputs], {name: ops.to_numpy(x) for name, x in gradients.items()}
    times: list[float] = []
    while sum(times) < SECONDS and len(times) < REPETITIONS:
        start = time.perf_counter()
        (value, _), gradients = run(params)
        for x in (value, *gradients.values()):
            last = x
        ops.to_numpy(ops.sum(last))
        times.append(time.perf_counter() - start)
    return found, statistics.median(times)


def _placed(backend: Backend, inputs: Inputs) -> tuple[dict[str, Array], dict[str, Array]]:
    """Indices, and floats in the types a model would give them: what has W in its name is a weight."""
    fixed: dict[str, Array] = {}
    params: dict[str, Array] = {}
    for name, x in inputs.items():
        if x.dtype.kind != "f":
            fixed[name] = backend.ops.from_numpy(x)
            continue
        dtype = backend.parameter_dtype if name.startswith(("w", "cos", "sin")) else backend.dtype
        (fixed if name.startswith(("cos", "sin")) else params)[name] = place(backend, x, dtype)
    return fixed, params


def _weight(backend: Backend, like: Array) -> Array:
    """By what an output is weighted in the sum that is differentiated."""
    return place(backend, np.asarray(_normal(1, *like.shape)), backend.ops.dtype(like))


def workload(kernel: str, sizes: Sizes) -> tuple[Inputs, Call]:
    """Inputs of a kernel by name, and its call."""
    made: tuple[Inputs, Call] = _WORKLOADS[kernel](sizes)
    return made


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def _linear(s: Sizes) -> tuple[Inputs, Call]:
    inputs = {"x": _normal(0, s.tokens, s.width), "w": _normal(1, s.hidden, s.width) / s.width**0.5}
    return inputs, lambda ops, a: ops.linear(a["x"], a["w"])


def _linear_accurate(s: Sizes) -> tuple[Inputs, Call]:
    inputs, _ = _linear(s)
    return inputs, lambda ops, a: ops.linear_accurate(a["x"], a["w"])


def _rms_norm(s: Sizes) -> tuple[Inputs, Call]:
    inputs = {"x": _normal(0, s.tokens, s.width), "w": 1 + _normal(1, s.width) / 8}
    return inputs, lambda ops, a: ops.rms_norm(a["x"], a["w"], 1e-6)


def _heads(s: Sizes, seed: int, heads: int) -> np.ndarray:
    return _normal(seed, 1, s.tokens, heads, s.head_width)


def _rope(s: Sizes) -> tuple[Inputs, Call]:
    cos, sin = rope_tables(s.tokens, s.head_width, 10000.0)
    inputs = {"x": _heads(s, 0, s.heads), "cos": cos, "sin": sin}
    return inputs, lambda ops, a: ops.rope(a["x"], a["cos"], a["sin"])


def _attention(s: Sizes) -> tuple[Inputs, Call]:
    inputs = {"q": _heads(s, 0, s.heads), "k": _heads(s, 1, s.heads // 2), "v": _heads(s, 2, s.heads // 2)}
    inputs = {name: x[:, :1024] for name, x in inputs.items()}  # the default keeps all scores
    return inputs, lambda ops, a: ops.attention(a["q"], a["k"], a["v"])


def _cached_attention(s: Sizes) -> tuple[Inputs, Call]:
    """The last positions of a text, and a cache of all, of which the kernel gets a copy that it may write into."""
    room, groups = min(s.tokens, 1024), s.heads // 2
    new = min(room, 16)
    inputs = {
        "q": _heads(s, 0, s.heads)[:, :new],
        "k": _heads(s, 1, groups)[:, :new],
        "v": _heads(s, 2, groups)[:, :new],
    }
    inputs |= {"keys": _heads(s, 3, groups)[:, :room], "values": _heads(s, 4, groups)[:, :room]}
    inputs["position"] = np.arange(room - new, room)[None]

    def call(ops: Ops, a: Mapping[str, Array]) -> Array:
        keys, values = (a[name] + ops.zeros(a[name].shape, ops.dtype(a[name])) for name in ("keys", "values"))
        return ops.cached_attention(a["q"], a["k"], a["v"], keys, values, a["position"])[0]

    return inputs, call


def _swiglu(s: Sizes) -> tuple[Inputs, Call]:
    return {"x": _normal(0, s.tokens, 2 * s.hidden)}, lambda ops, a: ops.swiglu(a["x"])


def _gelu(s: Sizes) -> tuple[Inputs, Call]:
    return {"x": _normal(0, s.tokens, s.hidden)}, lambda ops, a: ops.gelu(a["x"])


def _expert_weights(s: Sizes) -> dict[str, np.ndarray]:
    return {
        "w_in": _normal(1, s.experts, 2 * s.hidden, s.width) / s.width**0.5,
        "w_out": _normal(2, s.experts, s.width, s.hidden) / s.hidden**0.5,
    }


def _mlp(s: Sizes) -> tuple[Inputs, Call]:
    weights = {name: x[0] for name, x in _expert_weights(s).items()}
    return {"x": _normal(0, s.tokens, s.width), **weights}, lambda ops, a: ops.mlp(
        a["x"], a["w_in"], a["w_out"], "swiglu"
    )


def _choices(s: Sizes) -> np.ndarray:
    """Two different experts for each token, the first ones more often; a tenth of the choices get no expert."""
    draw = np.random.default_rng(3)
    first = (s.experts * draw.random(s.tokens) ** 2).astype(np.int64)
    second = (first + draw.integers(1, s.experts, s.tokens)) % s.experts
    chosen_TK = np.stack([first, second], axis=1)
    return np.where(draw.random(chosen_TK.shape) < 0.1, s.experts, chosen_TK).reshape(-1)


def _plan(ops: Ops, a: Mapping[str, Array], s: Sizes) -> DispatchPlan:
    return dispatch_plan(ops, a["expert_N"], CHOICES, s.experts)


def _gates(s: Sizes) -> np.ndarray:
    gates = np.random.default_rng(4).random(s.tokens * CHOICES)
    return np.where(_choices(s) < s.experts, gates, 0.0)


def _grouped_mlp(s: Sizes) -> tuple[Inputs, Call]:
    counts = np.bincount(_choices(s), minlength=s.experts + 1)[: s.experts]
    inputs = {"x": _normal(0, s.tokens * CHOICES, s.width), **_expert_weights(s), "counts": counts}
    return inputs, lambda ops, a: ops.grouped_mlp(a["x"], a["w_in"], a["w_out"], a["counts"], "swiglu")


def _sort_by_group(s: Sizes) -> tuple[Inputs, Call]:
    inputs = {"x": _normal(0, s.tokens * CHOICES, 1), "expert_N": _choices(s)}

    def call(ops: Ops, a: Mapping[str, Array]) -> Array:
        order_N, place_N, counts = ops.sort_by_group(a["expert_N"], s.experts + 1)
        first_N = ops.take_rows(ops.cumsum(counts, axis=0) - counts, a["expert_N"])
        rank_N1 = ops.reshape(ops.cast(place_N - first_N, ops.dtype(a["x"])), (-1, 1))
        return ops.take_rows(a["x"], order_N) * rank_N1

    return inputs, call


def _inverse(s: Sizes) -> tuple[Inputs, Call]:
    inputs = {"x": _normal(0, s.tokens, 1), "order_N": np.random.default_rng(6).permutation(s.tokens)}
    return inputs, lambda ops, a: ops.take_rows(a["x"], ops.inverse(a["order_N"]))


def _permute(s: Sizes) -> tuple[Inputs, Call]:
    inputs = {"x": _normal(0, s.tokens, s.width), "expert_N": _choices(s)}
    return inputs, lambda ops, a: ops.permute(a["x"], _plan(ops, a, s))


def _unpermute(s: Sizes) -> tuple[Inputs, Call]:
    inputs = {"y": _normal(0, s.tokens * CHOICES, s.width), "w_N": _gates(s), "expert_N": _choices(s)}
    return inputs, lambda ops, a: ops.unpermute(a["y"], a["w_N"], _plan(ops, a, s))


def _routed_mlp(s: Sizes) -> tuple[Inputs, Call]:
    inputs = {"x": _normal(0, s.tokens, s.width), "w_N": _gates(s), **_expert_weights(s), "expert_N": _choices(s)}
    return inputs, lambda ops, a: ops.routed_mlp(a["x"], a["w_N"], _plan(ops, a, s), a["w_in"], a["w_out"], "swiglu")


def _targets(s: Sizes) -> np.ndarray:
    return np.random.default_rng(5).integers(0, s.vocab, min(s.tokens, 2048))


def _cross_entropy(s: Sizes) -> tuple[Inputs, Call]:
    inputs = {"x": _normal(0, len(_targets(s)), s.vocab), "targets": _targets(s)}
    return inputs, lambda ops, a: ops.cross_entropy(a["x"], a["targets"])


def _linear_cross_entropy(s: Sizes) -> tuple[Inputs, Call]:
    hidden = _normal(0, len(_targets(s)), s.width)
    inputs = {"x": hidden, "w": _normal(1, s.vocab, s.width) / s.width**0.5, "targets": _targets(s)}
    return inputs, lambda ops, a: ops.linear_cross_entropy(a["x"], a["w"], a["targets"], 1e-4)


def _linear_cross_entropy_by_token(s: Sizes) -> tuple[Inputs, Call]:
    inputs, _ = _linear_cross_entropy(s)
    return inputs, lambda ops, a: ops.linear_cross_entropy_by_token(a["x"], a["w"], a["targets"], 1e-4)


_WORKLOADS: Mapping[str, Callable[[Sizes], tuple[Inputs, Call]]] = {
    "linear": _linear,
    "linear_accurate": _linear_accurate,
    "rms_norm": _rms_norm,
    "rope": _rope,
    "attention": _attention,
    "cached_attention": _cached_attention,
    "swiglu": _swiglu,
    "gelu": _gelu,
    "mlp": _mlp,
    "grouped_mlp": _grouped_mlp,
    "inverse": _inverse,
    "sort_by_group": _sort_by_group,
    "permute": _permute,
    "unpermute": _unpermute,
    "routed_mlp": _routed_mlp,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_cross_entropy_by_token": _linear_cross_entropy_by_token,
}


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """RMS of the difference over that of `want`; what is not finite, in either, is infinitely wrong."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape or not (np.isfinite(got).all() and np.isfinite(want).all()):
        return float("inf")
    size = np.sqrt(np.mean(want**2)) if want.size else 0.0
    error = np.sqrt(np.mean((got - want) ** 2)) if want.size else 0.0
    return float(error / size) if size else float(error and np.inf)


def judge(outcomes: Sequence[Outcome]) -> Result:
    """Passes if every kernel was compared, and values and gradients of both ways agree."""
    outcome = outcomes[0]
    done = outcome.done
    problems = [(event["end"], _problem(event)) for event in done]
    wrong = [(label, problem) for label, problem in problems if problem]
    wrong += [(crash.label, crash.ending) for crash in outcome.crashes]
    faster = [event for event in done if "chosen_s" in event]
    ratios = [event["chosen_s"] / event["composed_s"] for event in faster]
    summary = f"{len(done)} kernels agree with their composition"
    if ratios:
        summary += f", and take {statistics.median(ratios):.2f} times as long (median)"
    fused = [event["chosen_s"] / event["default_s"] for event in faster if "default_s" in event]
    if fused:
        summary += f"; {len(fused)} are fused, and take {statistics.median(fused):.2f} times as long as without"
    if wrong:
        summary = f"{len(wrong)} of {outcome.reached} kernels are wrong, the first {wrong[0][0]}: {wrong[0][1]}"
    tables = [Table.of("what is wrong", ("kernel", "what"), wrong)] if wrong else []
    times = ("chosen, ms", "default, ms", "composed, ms")
    header = ("type", "kernel", "tokens", "values", "gradients", *times, "chosen is")
    tables.append(Table.of("kernels, forward and backward", header, list(_rows(faster))))
    return judgement(bool(wrong), outcome.reached, summary, outcome.expected, tables=tables, data={"kernels": done})


def _problem(event: Mapping[str, Any]) -> str | None:
    if "problem" in event:
        return str(event["problem"])
    limit = LIMITS[event["dtype"]]
    if not event["values"] <= limit:
        return f"values differ by {event['values']:.2g}, limit {limit:g}"
    for name, error in event["gradients"].items():
        if not error <= limit:
            return f"the gradient by {name} differs by {error:.2g}, limit {limit:g}"
    return None


def _rows(done: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for event in done:
        yield (
            event["dtype"],
            event["kernel"],
            f"{event['tokens']:,}",
            f"{event['values']:.1e}",
            f"{max(event['gradients'].values(), default=0.0):.1e}",
            f"{event['chosen_s'] * 1e3:.2f}",
            f"{event['default_s'] * 1e3:.2f}" if "default_s" in event else "the same",
            f"{event['composed_s'] * 1e3:.2f}",
            event["choice"],
        )
