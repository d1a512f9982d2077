"""The whole config: one pydantic model, one YAML file."""

from moeport.config.data import DataConfig
from moeport.config.model import ModelConfig
from moeport.config.training import (
    BackendConfig,
    CheckpointConfig,
    CommConfig,
    MetricsConfig,
    OptimizerConfig,
    ParallelismConfig,
    RunConfig,
    TrainingConfig,
)
from moeport.core.section import Section


class Config(Section):
    """Everything that defines a training run."""

    run: RunConfig = RunConfig()
    """Run folder."""
    model: ModelConfig = ModelConfig()
    """Model shapes and losses."""
    data: DataConfig = DataConfig()
    """Text and tokens."""
    training: TrainingConfig = TrainingConfig()
    """Length, batch, evaluation."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimiser and schedule."""
    parallelism: ParallelismConfig = ParallelismConfig()
    """What ranks share."""
    comm: CommConfig = CommConfig()
    """Algorithm and timeout."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    metrics: MetricsConfig = MetricsConfig()
    """Logging and report."""
    backend: BackendConfig = BackendConfig()
    """Framework, device, arithmetic."""
