"""Metrics that the tests of this folder share."""

import json
import math
from typing import Any

import numpy as np

from moeport.training.metrics import EvaluationMetrics, MetricsLog, StepMetrics

STEP = StepMetrics(
    step=1,
    loss=8.3,
    total_loss=8.4,
    lr=1e-3,
    grad_norm=1.5,
    tokens_per_second=1234.5,
    step_time=0.25,
    tokens=8192,
    mfu=0.31,
    load_balance=1.02,
    router_z=0.5,
    output_z=0.0,
    imbalance=1.23,
    drop_rate=0.02,
    dead_experts=0,
    load_entropy=0.9,
    expert_load=[[0.5, 0.5], [0.25, 0.75]],
    drop_rate_per_layer=[0.0, 0.04],
)

SUMMARY: dict[str, Any] = {
    "run_dir": "runs/example",
    "steps": 1000,
    "val_loss": 2.3456,
    "val_bits_per_byte": 1.2345,
    "baselines": {"gzip -9": 2.111, "xz -9": 1.987},
    "tokens_per_second": 12345.6,
    "wall_time": 754.0,
    "peak_memory": 1.75,
    "parameters_total": 12_345_678,
    "parameters_active": 4_321_000,
    "training_flops_per_token": 26_000_000,
    "device": "cpu (2 threads)",
    "dtype": "float32",
    "versions": {"moeport": "0.1.0", "python": "3.12.4", "torch": "2.11.0"},
    "checkpoint": "runs/example/checkpoints/step-1000",
    "sample": {"prompt": "def ", "text": "read(self, path):\n    return self.files[path]\n"},
}


def write_run(
    run_dir,
    steps,
    layers=4,
    experts=8,
    drop=0.03,
    evaluations=10,
    config="model:\n  num_layers: 4\n",
    summary=SUMMARY,
    exchanged=(),
    output_z=0.0,
):
    """The folder of a made-up run: loss falls, experts drift from collapsed to balanced."""
    random = np.random.default_rng(0)
    run_dir.mkdir(parents=True, exist_ok=True)
    skew_LE = random.normal(0, 1.2, (layers, experts))
    with MetricsLog(run_dir, resume_step=None) as log:
        for step in range(1, steps + 1):
            done = step / steps
            noise = random.normal(0, 1, 6)
            load_LE = np.exp(skew_LE * (0.15 + math.exp(-12 * done)) + random.normal(0, 0.08, (layers, experts)))
            load_LE /= load_LE.sum(1, keepdims=True)
            imbalance = float((load_LE.max(1) * experts).mean())
            drop_L = np.clip(drop * (load_LE.max(1) * experts - 1.05) / 0.5, 0, 1)
            loss = 2.4 + 5.9 * math.exp(-9 * done**0.6) + 0.05 * noise[0]
            log.step(
                StepMetrics(
                    step=step,
                    loss=loss,
                    total_loss=loss + 0.04,
                    lr=3e-3 * min(1.0, 20 * done) * (1 + math.cos(math.pi * done)) / 2,
                    grad_norm=math.exp(0.2 * noise[1])
                    * (0.5 + 6 * math.exp(-30 * done))
                    * (24 * (step % 977 == 0) + 1),
                    tokens_per_second=12000 * (1 + 0.04 * noise[2]) / (3 if step == 1 else 1),
                    step_time=0.66,
                    tokens=8192 * step,
                    mfu=0.31 * (1 + 0.04 * noise[2]),
                    load_balance=1 + 0.25 * (imbalance - 1),
                    router_z=0.4 + done,
                    output_z=output_z,
                    imbalance=imbalance,
                    drop_rate=float(drop_L.mean()),
                    expert_load=load_LE.round(4).tolist(),
                    drop_rate_per_layer=drop_L.tolist(),
                    exchanged_bytes_per_layer=list(exchanged),
                )
            )
            if evaluations and step % max(1, steps // evaluations) == 0:
                value = 2.5 + 5.7 * math.exp(-9 * done**0.6)
                log.evaluation(EvaluationMetrics(step, value, value / 1.9))
    if config:
        (run_dir / "config.yaml").write_text(config)
    if summary:
        (run_dir / "summary.json").write_text(json.dumps(summary))
