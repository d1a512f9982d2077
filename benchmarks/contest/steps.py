"""Training steps of one model: moeport's with and without each kernel, a plain torch model's, transformers'."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from abstraction_tax import plain_step, plain_twin
from torch import nn

from contest.child import Say, free, short
from contest.clock import device_name, host_waits, peak_bytes, saved_bytes, synchronize
from contest.models import batches_of, config_of, described, shapes_of, vocabulary_of, weights_of
from moeport.backends.torch.backend import TorchBackend
from moeport.comm.mesh import single_mesh
from moeport.config import Config
from moeport.facts import BACKENDS
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM
from moeport.training.placed import place_model

LEARNING_RATE = 1e-6
"""Small, so that the loads of the experts stay what they were at the start."""
TURN_S = 0.3
"""About how long one contender's turn lasts; several steps if one is shorter."""
MOST_STEPS = 50
LOSS_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""How far the losses of the first steps of models with the same weights may differ, relative to the loss."""
OURS, PLAIN, TRANSFORMERS = "moeport", "plain torch", "transformers Qwen3-MoE"

Step = Callable[[Batch], torch.Tensor]
"""One training step, which returns its loss on the device."""


@dataclass(frozen=True)
class Variant:
    """A way to train the model."""

    name: str
    overrides: Sequence[str] = ()
    """Of the config."""


def ablations(device: str) -> list[Variant]:
    """moeport without fused kernels, and with each of them left to its composition in turn."""
    kernels = list(dict.fromkeys(fact.kernel for fact in BACKENDS["torch"].fused_on(device)))
    return [
        Variant(f"{OURS} without fused kernels", ["backend.kernels=default"]),
        *(Variant(f"{OURS} without {kernel}", [f"backend.kernels={{{kernel}: default}}"]) for kernel in kernels),
    ]


def our_step(config: Config, weights: Mapping[str, np.ndarray]) -> tuple[Step, TorchBackend]:
    """A step of moeport's training model, and its backend."""
    backend, lm = TorchBackend(config.backend), shapes_of(config)
    if not is_same_model(lm, weights):
        weights = weights_of(lm)
    model = place_model(config, backend, lm, weights, single_mesh(backend.ops)).arrays

    def step(batch: Batch) -> torch.Tensor:
        terms = model.accumulate(batch, 1.0)
        model.step(LEARNING_RATE, model.gradient_norm())
        return terms.loss

    return deterministic(step, config), backend


def deterministic(step: Step, config: Config) -> Step:
    """A step under the config's `backend.deterministic`, which is one switch for all contenders of a process."""

    def run(batch: Batch) -> torch.Tensor:
        torch.use_deterministic_algorithms(config.backend.deterministic)
        return step(batch)

    return run


def is_same_model(lm: DecoderLM, weights: Mapping[str, np.ndarray]) -> bool:
    """Whether a model has these parameters."""
    return {spec.name: spec.shape for spec in lm.parameter_specs()} == {k: v.shape for k, v in weights.items()}


def plain(config: Config, weights: Mapping[str, np.ndarray]) -> Step:
    """A step of the hand-written model of the same shapes, with the same weights."""
    dtype = getattr(torch, config.backend.dtype)
    model = plain_twin(config, vocabulary_of(config), dict(weights), dtype).to(config.backend.device)
    run = plain_step(model, config)
    return deterministic(lambda batch: run(batch, LEARNING_RATE), config)


def transformers(config: Config, weights: Mapping[str, np.ndarray]) -> Step:
    """A step of transformers' Qwen3-MoE of the same sizes with weights of its own, float32 under autocast."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    model, moe = config.model, config.model.moe
    sizes = Qwen3MoeConfig(
        vocab_size=vocabulary_of(config),
        hidden_size=model.d_model,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        num_experts=moe.num_experts,
        num_experts_per_tok=moe.router.experts_per_token,
        moe_intermediate_size=moe.expert_hidden,
        norm_topk_prob=True,
        tie_word_embeddings=model.tie_embeddings,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
        use_cache=False,
        pad_token_id=None,
    )
    sizes._experts_implementation = "grouped_mm"
    device = config.backend.device
    with torch.device(device):
        lm = Qwen3MoeForCausalLM(sizes).train()
    optimizer = torch.optim.AdamW(lm.parameters(), lr=LEARNING_RATE, fused=True)
    dtype = getattr(torch, config.backend.dtype)

    def step(batch: Batch) -> torch.Tensor:
        token_BS, target_BS = (torch.from_numpy(ids).to(device) for ids in (batch.token_BS, batch.target_BS))
        with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
            out = lm(input_ids=token_BS, output_router_logits=True)
        loss = nn.functional.cross_entropy(out.logits.float().flatten(0, 1), target_BS.flatten()) + out.aux_loss * 0.01
        loss.backward()
        nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return deterministic(step, config)


@dataclass(frozen=True)
class StepTerms:
    """How steps are measured."""

    device: str
    dtype: str
    rounds: int
    deadline: float
    """time.time() after which no contender starts."""


def time_model(
    name: str, variants: Sequence[Variant], others: Sequence[str], terms: StepTerms, say: Say
) -> dict[str, Any]:
    """Time moeport's step on one model, then each other way to train it in turn with it.

    Only two models are on the device at a time: moeport's and the other. So every row has the ratio of its time to
    moeport's in the same rounds.

    Args:
        name: in MODELS, or a YAML file.
        variants: of moeport, besides itself.
        others: of PLAIN and TRANSFORMERS.
        terms: device, type, rounds, deadline.
        say: is told the result so far.

    Returns: `model`, `peak_flops`, `kernels`, and `rows` by contender with `step_s`, `over_moeport`, `tokens_per_s`,
        `mfu`, `held`, `peak` and `waits`, or a `reason`.
    """
    config = config_of(name, terms.device, terms.dtype)
    weights, batches = weights_of(shapes_of(config)), batches_of(config, 4)
    step, backend = our_step(config, weights)
    rows: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {"model": described(config, name), "rows": rows, "dtype": terms.dtype}
    result["device"] = device_name(terms.device)
    result["peak_flops"] = backend.matmul_flops_per_second()
    rows[OURS] = measured(step, batches, terms)
    loss = rows[OURS]["loss"]
    _timed(rows, result, {OURS: step}, batches, terms)
    result["kernels"] = backend.fused_kernels()
    say(result)
    builders: dict[str, Callable[[], Step]] = {
        variant.name: partial(_varied, name, terms, variant.overrides, weights) for variant in variants
    }
    for label, build in ((PLAIN, plain), (TRANSFORMERS, transformers)):
        if label in others:
            builders[label] = partial(build, config, weights)
    same = {variant.name for variant in variants if not any(o.startswith("model.") for o in variant.overrides)} | {
        PLAIN
    }
    for label, make in builders.items():
        rows[label] = {}
        if time.time() > terms.deadline:
            rows[label]["reason"] = "no time left"
            continue
        try:
            _against(label, make, step, batches, terms, result)
            if label in same and abs(rows[label]["loss"] - loss) > LOSS_TOLERANCE[terms.dtype] * abs(loss):
                rows[label]["reason"] = f"wrong: a first loss of {rows[label]['loss']:.5g} instead of {loss:.5g}"
        except Exception as error:
            rows[label]["reason"] = short(error)
        free(terms.device)
        say(result)
    return result


def _varied(name: str, terms: StepTerms, overrides: Sequence[str], weights: Mapping[str, np.ndarray]) -> Step:
    return our_step(config_of(name, terms.device, terms.dtype, overrides), weights)[0]


def _against(
    label: str, make: Callable[[], Step], step: Step, batches: Sequence[Batch], terms: StepTerms, result: dict[str, Any]
) -> None:
    if label == TRANSFORMERS and find_spec("transformers") is None:
        result["rows"][label]["reason"] = "transformers not installed"
        return
    other = make()
    result["rows"][label] = measured(other, batches, terms)
    _timed(result["rows"], result, {OURS: step, label: other}, batches, terms)


def measured(step: Step, batches: Sequence[Batch], terms: StepTerms) -> dict[str, Any]:
    """What single steps show: the first loss, memory, waits of the host."""
    with saved_bytes([]) as saved:
        loss = float(step(batches[0]))
    row: dict[str, Any] = {"loss": loss, "held": sum(saved.values())}
    synchronize(terms.device)
    row["peak"] = peak_bytes(lambda: step(batches[1]), terms.device)
    row["waits"] = host_waits(lambda: step(batches[2]), terms.device)
    return row


def _timed(
    rows: dict[str, dict[str, Any]],
    result: Mapping[str, Any],
    steps: Mapping[str, Step],
    batches: Sequence[Batch],
    terms: StepTerms,
) -> None:
    """Rounds in which each has its turn; the last of `steps` is compared with moeport."""
    counts = {name: _steps_of_a_turn(step, batches, terms) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(terms.rounds):
        for name in list(steps) if index % 2 else list(steps)[::-1]:
            times[name].append(_turn(steps[name], batches, counts[name], terms.device))
    name = list(steps)[-1]
    rows[name]["over_moeport"] = [own / ours for own, ours in zip(times[name], times[OURS], strict=True)]
    for each, found in times.items():  # moeport's row has all of its turns
        row, model = rows[each], result["model"]
        row["step_s"] = [*row.get("step_s", []), *found]
        row["tokens_per_s"] = model["tokens"] / float(np.median(row["step_s"]))
        row["mfu"] = row["tokens_per_s"] * model["flops_per_token"] / result["peak_flops"]


def _steps_of_a_turn(step: Step, batches: Sequence[Batch], terms: StepTerms) -> int:
    _turn(step, batches, 1, terms.device)
    return int(min(MOST_STEPS, max(1, TURN_S // max(1e-9, _turn(step, batches, 1, terms.device)))))


def _turn(step: Step, batches: Sequence[Batch], count: int, device: str) -> float:
    """Mean seconds per step over several steps, between which the host may run ahead, as in training."""
    synchronize(device)
    start = time.perf_counter()
    for index in range(count):
        step(batches[index % len(batches)])
    synchronize(device)
    return (time.perf_counter() - start) / count
