"""The batches of a run, drawn by counter: they depend on the config, the data and the step number only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moeport.comm.communicator import Communicator
from moeport.config.training import TrainingConfig
from moeport.data import Dealing, DomainTokens, Examples, MixedTokens, Sampler
from moeport.data.denoising import Denoising
from moeport.data.document_starts import document_starts
from moeport.model.batch import Batch
from moeport.model.transformer import Transformer


class Batches:
    """Micro-batches of every step, with their routing noise.

    Args:
        config: the `training` section.
        shapes: the model, which knows what noise its routers need.
        examples: the training data.
        world: the ranks that share each batch, of which this process is one.
        first_token: id at which documents begin that attention stays within; None: it crosses them.
        denoising: rearranges the sequences; None: each token predicts the next.
    """

    def __init__(
        self,
        config: TrainingConfig,
        shapes: Transformer,
        examples: Examples,
        world: Communicator,
        first_token: int | None = None,
        denoising: Denoising | None = None,
    ):
        self.config, self.shapes, self.examples, self.world = config, shapes, examples, world
        self.first_token, self.denoising = first_token, denoising
        self.dealing: Dealing | None = None
        """Which domain each sequence of a step is from; None: there are no domains."""
        if isinstance(examples, DomainTokens):
            nodes, parts = shapes.config.moe.router.nodes, config.gradient_accumulation
            self.dealing = Dealing.of([*examples.parts], config.batch_size, world.nodes, parts, nodes)
        self.sampler = self._sampler()

    def _sampler(self) -> Sampler:
        config, examples = self.config, self.examples
        if self.dealing and isinstance(examples, DomainTokens):
            return examples.dealt(self.dealing, config.seed)
        if isinstance(examples, MixedTokens):
            return examples.sampler(config.batch_size, config.seed)
        return Sampler(examples.num_sequences, config.batch_size, config.seed)

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens per step, over all ranks."""
        return self.config.batch_size * self.examples.sequence_length

    @property
    def num_parts(self) -> int:
        """Number of micro-batches per step, over all ranks."""
        return self.config.gradient_accumulation * self.world.size

    def of_step(self, step: int) -> Iterator[Batch]:
        """This rank's micro-batches of `step`, counted from 0."""
        world = self.world
        token_BS, target_BS = self.examples.batch(self.sampler.rank_indices(step, world.rank, world.size))
        weight_BS: np.ndarray | None = None
        if self.denoising:
            found = self.denoising.of_step(step, self.config.batch_size, self._own[0], token_BS, target_BS)
            token_BS, target_BS, weight_BS = found or (token_BS, target_BS, None)
        documents = document_starts(token_BS, self.first_token)
        whole = Batch(token_BS, target_BS, self._noise(step), documents, self._domains(), weight_BS)
        size = len(token_BS) // self.config.gradient_accumulation
        for start in range(0, len(token_BS), size):
            yield whole.rows(start, start + size)

    def objectives(self, step: int) -> np.ndarray | None:
        """The number of the denoiser of each of this rank's sequences in `step`, counted from 0; None: it has none."""
        if self.denoising is None or not self.denoising.config.mixes(step):
            return None
        first, end = self._own
        return self.denoising.chosen(step, self.config.batch_size)[first:end]

    def _domains(self) -> np.ndarray | None:
        first, end = self._own
        return self.dealing.domain_B[first:end] if self.dealing else None

    @property
    def _own(self) -> tuple[int, int]:
        """The positions of this rank's sequences in the whole batch: the first one, and the end."""
        size, world = self.config.batch_size, self.world
        return size * world.rank // world.size, size * (world.rank + 1) // world.size

    def _noise(self, step: int) -> dict[str, np.ndarray]:
        """The noise of this rank's sequences, which depends on their positions in the whole batch only."""
        config, (first, end) = self.config, self._own
        return self.shapes.noise(end - first, self.examples.sequence_length, config.seed, step, first)
