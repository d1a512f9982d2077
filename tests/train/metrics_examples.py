"""Metrics that the tests of this folder share."""

from moeport.train.metrics import StepMetrics

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
    expert_load=[[0.5, 0.5], [0.25, 0.75]],
    drop_rate_per_layer=[0.0, 0.04],
)
