"""What a run will train, as far as it is known before data are read and models are placed."""

from __future__ import annotations

from dataclasses import dataclass

from moeport.model.transformer import Transformer


@dataclass(frozen=True)
class Planned:
    """What will be trained."""

    model: Transformer
    batch_size: int
    """Sequences of a micro-batch."""
    sequence_length: int

    @property
    def key(self) -> str:
        """Differs for models and batches that take another time."""
        sizes = self.model.config.model_dump(mode="json"), self.model.parameter_counts()
        return repr((sizes, self.batch_size, self.sequence_length))
