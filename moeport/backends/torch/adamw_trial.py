"""The trial of a fused step of AdamW."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from moeport.backends.trial import TOLERANCE, Candidate, disagreement, failure

ADAMW = "adamw"
"""The step of the optimiser, in `backend.kernels` and in the table of facts."""
STEPS = 3


def step_fault(candidate: Candidate, device: torch.device, dtype: str) -> str | None:
    """What is wrong with a fused AdamW, whose `function` makes the optimiser; None if it steps as PyTorch's plain loop.

    Returns: as `moeport.backends.trial.fault_of`.
    """
    if dtype not in candidate.fact.dtypes:
        return f"does not compute in {dtype}"
    expected = _stepped(torch.optim.AdamW, device, dtype, foreach=False)
    try:
        received = _stepped(candidate.function, device, dtype)
    except Exception as error:
        return failure(error)
    return disagreement(expected, received, TOLERANCE[dtype])


def _stepped(
    make: Callable[..., torch.optim.Optimizer], device: torch.device, dtype: str, **options: bool
) -> list[np.ndarray]:
    """Two parameters and their moments after some steps: one decays, and learning rates change."""
    random = np.random.default_rng(0)
    shapes = ((8, 16), (8,))
    parameters = [
        torch.tensor(random.standard_normal(shape), dtype=getattr(torch, dtype), device=device) for shape in shapes
    ]
    groups = [{"params": [x], "weight_decay": decay} for x, decay in zip(parameters, (0.1, 0.0), strict=True)]
    optimizer = make(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, **options)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        for x in parameters:
            x.grad = torch.tensor(random.standard_normal(tuple(x.shape)), dtype=x.dtype, device=device)
        optimizer.step()
    moments = [optimizer.state[x][name] for x in parameters for name in ("exp_avg", "exp_avg_sq")]
    return [x.cpu().numpy().copy() for x in (*parameters, *moments)]
