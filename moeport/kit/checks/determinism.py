"""A training in two processes with backend.deterministic: losses and weights must be the same bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moeport.backends.base import TrainingOptions
from moeport.config import config_from_dict
from moeport.config.training import OptimizerConfig
from moeport.core.parameters import initial_parameters
from moeport.kit.corpus import training
from moeport.kit.result import Outcome, Result, judgement
from moeport.kit.task import Task
from moeport.model.batch import Batch
from moeport.model.decoder import DecoderLM
from moeport.pages.tables import Table

VOCAB, SEQUENCES, TOKENS = 512, 8, 128


def work(task: Task) -> dict[str, Any]:
    """In each type: the loss of every step, and digests of all weights at the end, by name."""
    types = task.dtypes[:2] if task.quick else task.dtypes
    return {dtype: _train(task, dtype, 3 if task.quick else 10) for dtype in types}


def _train(task: Task, dtype: str, steps: int) -> dict[str, Any]:
    backend = task.open(dtype, deterministic=True)
    model = DecoderLM(config_from_dict(training()).model, VOCAB)
    params = initial_parameters(model.parameter_specs(), seed=0)
    trained = backend.training_model(model, params, TrainingOptions(OptimizerConfig()))
    draw, losses = np.random.default_rng(0), []
    for _ in range(steps):
        token_BS = draw.integers(0, VOCAB, (SEQUENCES, TOKENS + 1))
        terms = trained.accumulate(Batch(token_BS[:, :-1], token_BS[:, 1:]), 1.0)
        norm = trained.gradient_norm()
        losses.append([float(backend.ops.to_numpy(x)).hex() for x in (terms.loss, norm)])
        trained.step(1e-3, norm)
    weights = {name: hashlib.sha256(x.tobytes()).hexdigest()[:16] for name, x in trained.parameters().items()}
    return {"losses": losses, "weights": weights}


def judge(outcomes: Sequence[Outcome]) -> Result:
    """Passes if both processes computed the same bits."""
    first, second = (outcome.value for outcome in outcomes)
    rows = [(dtype, *_compared(first[dtype], second[dtype])) for dtype in first]
    different = [row for row in rows if row[1] != "equal" or row[2] != "equal"]
    summary = f"two runs are the same to the bit: {', '.join(first)}"
    if different:
        summary = "two runs differ: " + "; ".join(
            f"{dtype}: losses {loss}, weights {w}" for dtype, loss, w in different
        )
    table = Table.of("two runs", ("type", "losses and gradient norms", "weights"), rows)
    return judgement(bool(different), len(rows), summary, tables=[table], data=[first, second])


def _compared(a: dict[str, Any], b: dict[str, Any]) -> tuple[str, str]:
    step = next((i for i, (x, y) in enumerate(zip(a["losses"], b["losses"], strict=True), start=1) if x != y), None)
    names = [name for name, digest in a["weights"].items() if b["weights"].get(name) != digest]
    losses = "equal" if step is None else f"differ from step {step}"
    return losses, f"{len(names)} differ, such as {names[0]}" if names else "equal"
