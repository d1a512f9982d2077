"""What a run learns: its data, and everything that depends on the kind of data."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from moeport.backends.base import EvaluationModel
from moeport.comm.communicator import Communicator
from moeport.config.schema import Config
from moeport.config.step_ranges import up_to
from moeport.data import DomainTokens, Examples, ImageSplit, MixedTokens, PreparedData, prepare_data, read_images
from moeport.data.denoising import Denoising
from moeport.data.document_starts import document_starts, hidden_share
from moeport.data.tokenizer import name_of
from moeport.errors import UserError
from moeport.model.build import build_model
from moeport.model.transformer import Transformer
from moeport.pages.words import counted
from moeport.routers.maskmoe import most_frequent
from moeport.training.agreed import of_data
from moeport.training.evaluate import (
    Evaluation,
    Window,
    evaluate,
    evaluate_domains,
    evaluate_images,
    losses_by_frequency,
    losses_by_objective,
)
from moeport.training.generate import sample
from moeport.training.run_dir import TOKENIZER_FILE
from moeport.training.sampling import Sampling
from moeport.training.summary import SAMPLE_PROMPT_CHARACTERS, SAMPLE_TOKENS

FREQUENT_SHARE = 0.8
"""Share of the training tokens that the frequent ids make up; as MaskMoE divides them."""
COUNTED = 2**18
"""Tokens by which the most frequent ids are found."""
LOOKED_AT = 256
"""Sequences whose documents tell how many pairs of tokens attention does not see."""


class Task(ABC):
    """The data that a run learns from.

    Args:
        config: the whole config.
    """

    train: Examples
    validation: Examples
    vocab_size = 0
    """Vocabulary size of the tokenizer; 0 without one."""
    tokenizer_fingerprint: str | None = None
    """`Tokenizer.fingerprint`; None without a tokenizer."""
    kind: ClassVar[str]
    """Describes the examples in messages."""
    remedy: ClassVar[str]
    """What to restore if they have changed."""
    token_counts: Callable[[], np.ndarray] | None = None
    """Counts the vocabulary ids in the training data; None for data without ids."""
    first_token: int | None = None
    """Id at which documents begin that attention stays within; None: it crosses them."""
    denoising: Denoising | None = None
    """Rearranges the sequences of a step; None: each token predicts the next."""

    def __init__(self, config: Config):
        self.config = config

    def model(self) -> Transformer:
        """The model's shapes.

        Raises UserError if the model does not fit the data.
        """
        return build_model(self.config.model, self.config.data, self.vocab_size)

    @abstractmethod
    def describe(self) -> str:
        """One line that says what the examples are and how many there are."""

    @abstractmethod
    def evaluate(self, world: Communicator, model: EvaluationModel, batch_size: int) -> Evaluation:
        """Evaluate on all held-out examples; every rank calls it."""

    def loss_by_frequency(
        self, world: Communicator, model: EvaluationModel, batch_size: int
    ) -> dict[str, float] | None:
        """The loss on rare and on frequent held-out ids; every rank calls it. None for data without ids."""
        return None

    def loss_by_objective(
        self, world: Communicator, model: EvaluationModel, batch_size: int
    ) -> dict[str, float] | None:
        """The loss of each denoiser on held-out text; every rank calls it. None if the objective is causal."""
        return None

    def frequent_ids(self, number: int) -> dict[int, str]:
        """The most frequent vocabulary ids of the training data with their texts, most frequent first; none for data
        without ids.
        """
        return {}

    @abstractmethod
    def save(self, run_dir: Path) -> None:
        """Write what using the trained model requires besides its checkpoint."""

    def summary(self, model: EvaluationModel) -> dict[str, Any]:
        """Values of `RunSummary` that exist only for this kind of data."""
        return {}


class TextTask(Task):
    """Predict the next token of text."""

    kind = "text or with another tokenizer"
    remedy = "the text (for stdlib: the same Python)"

    def __init__(self, config: Config, data: PreparedData):
        super().__init__(config)
        self.data, self.train, self.validation = data, data.train, data.validation
        self.vocab_size, self.tokenizer_fingerprint = data.tokenizer.vocab_size, data.tokenizer.fingerprint
        self.token_counts = data.train.token_counts
        if config.data.document_mask:
            self.first_token = data.tokenizer.end_of_text
        self.denoising = self._denoising()

    def _denoising(self) -> Denoising | None:
        """That of the config, if it has one.

        Raises UserError if the model has no room for its ids.
        """
        objective, length = self.config.data.objective, self.config.data.sequence_length
        if not objective.is_mixture:
            return None
        rows, needed = self.config.model.vocab_size, self.vocab_size + objective.special_tokens(length)
        if rows is None or rows < needed:
            raise UserError(
                f"model.vocab_size: has no room for the modes and sentinels of data.objective (got {rows}); expected "
                f"at least {needed}, {self.vocab_size} of them for the tokenizer"
            )
        seed = self.config.training.seed
        return Denoising(objective, length, rows, self.data.tokenizer.end_of_text, seed)

    @override
    def model(self) -> Transformer:
        rows = self.config.model.vocab_size
        if rows is not None and rows < self.vocab_size:
            raise UserError(
                f"model.vocab_size: smaller than the tokenizer's vocabulary (got {rows}); expected at least "
                f"{self.vocab_size}, or null"
            )
        return super().model()

    @override
    def describe(self) -> str:
        train, held_out = self.data.train, self.data.validation.num_documents
        line = (
            f"text        {counted(train.num_documents, 'document')}, {train.num_bytes / 1e6:.1f} MB, "
            f"{train.num_tokens:,} tokens; {counted(held_out, 'document')} held out" + _parts_label(train)
        )
        return line + self._hidden_pairs() + self._objective_label()

    def _objective_label(self) -> str:
        """Says what the sequences are rearranged by, and until when."""
        objective = self.config.data.objective
        if not objective.is_mixture:
            return ""
        until = f" in the first {objective.steps:,} steps" if objective.steps else ""
        number = len(objective.mixture)
        return f"; rearranged by {counted(number, 'denoiser')}{until}"

    def _hidden_pairs(self) -> str:
        """Says how much the mask of documents hides, if there is one, from some sequences."""
        count = self.train.num_sequences
        token_BS, _ = self.train.batch(np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(np.int64))
        document_BS = document_starts(token_BS, self.first_token)
        if document_BS is None:
            return ""
        return f"; attention within them, which hides {hidden_share(document_BS):.0%} of the pairs of tokens"

    @override
    def loss_by_frequency(self, world: Communicator, model: EvaluationModel, batch_size: int) -> dict[str, float]:
        frequent_V = most_frequent(self.data.train.token_counts(), FREQUENT_SHARE)
        windows = self._windows(batch_size)
        return losses_by_frequency(world, model, windows, frequent_V, self.first_token, self._has_domains)

    @override
    def loss_by_objective(
        self, world: Communicator, model: EvaluationModel, batch_size: int
    ) -> dict[str, float] | None:
        if self.denoising is None:
            return None
        return losses_by_objective(world, model, self._windows(batch_size), self.denoising, self._has_domains)

    @override
    def frequent_ids(self, number: int) -> dict[int, str]:
        """Of a sample of at most COUNTED tokens, evenly spread; equally frequent ids by number."""
        count, most = self.train.num_sequences, max(1, COUNTED // self.train.sequence_length)
        token_BS, _ = self.train.batch(np.linspace(0, count - 1, min(count, most)).astype(np.int64))
        ids, counts = np.unique(token_BS, return_counts=True)
        chosen = ids[np.argsort(-counts, kind="stable")[:number]].tolist()
        return {each: name_of(self.data.tokenizer, each) for each in chosen}

    @property
    def _has_domains(self) -> bool:
        return isinstance(self.data.validation, DomainTokens)

    def _windows(self, batch_size: int) -> Iterable[tuple[int, Window]]:
        """Batches of held-out text, each with the number of its domain, or 0."""
        held_out = self.data.validation
        if isinstance(held_out, DomainTokens):
            return held_out.windows_by_domain(batch_size)
        return ((0, window) for window in held_out.windows(batch_size))

    @override
    def evaluate(self, world: Communicator, model: EvaluationModel, batch_size: int) -> Evaluation:
        held_out, first = self.data.validation, self.first_token
        if isinstance(held_out, DomainTokens):
            windows, names = held_out.windows_by_domain(batch_size), [*held_out.parts]
            return evaluate_domains(world, model, windows, names, held_out.num_bytes, first)
        return evaluate(world, model, held_out.windows(batch_size), held_out.num_bytes, first)

    def save(self, run_dir: Path) -> None:
        """Write the tokenizer."""
        self.data.tokenizer.save(run_dir / TOKENIZER_FILE)

    def summary(self, model: EvaluationModel) -> dict[str, Any]:
        """Bits per byte of general-purpose compressors, a sample, what was skipped, and what each source gave."""
        return {
            "baselines": {f"{name} -9": bits for name, bits in self.data.baselines.items()},
            "sample": self._sample(model),
            "skipped": self.data.unreadable,
            "sources": self._sources(),
        }

    def _sample(self, model: EvaluationModel) -> dict[str, str] | None:
        """A prompt and what the model adds to it."""
        wanted = self.config.metrics.sample_tokens
        tokens = SAMPLE_TOKENS if wanted is None else wanted
        if not tokens:
            return None
        context, prompt = self.config.data.sequence_length, self._sample_prompt()
        text = sample(model, self.data.tokenizer, prompt, context, Sampling(max_tokens=tokens))
        return {"prompt": prompt, "text": text}

    def _sources(self) -> dict[str, dict[str, float]]:
        """Tokens and epochs that the run takes from each source of a mixture."""
        train, training = self.data.train, self.config.training
        if not isinstance(train, MixedTokens) or isinstance(train, DomainTokens):
            return {}
        sampler = train.sampler(training.batch_size, training.seed)
        sequences = Counter(sampler.drawn(training.steps))
        for first, last in up_to(training.skipped, training.steps):
            sequences.subtract(sampler.drawn(last))
            sequences.update(sampler.drawn(first - 1))
        return {
            name: {"tokens": number * train.sequence_length, "epochs": number / train.parts[name].num_sequences}
            for name, number in sequences.items()
        }

    def _sample_prompt(self) -> str:
        """The one of the config, or the first words of the first held-out document."""
        given = self.config.metrics.sample_prompt
        if given is not None:
            return given
        tokenizer = self.data.tokenizer
        ids = self.data.validation.first(SAMPLE_PROMPT_CHARACTERS).tolist()
        ids = ids[: ids.index(tokenizer.end_of_text)] if tokenizer.end_of_text in ids else ids
        text = tokenizer.decode(ids).rstrip("\ufffd")[:SAMPLE_PROMPT_CHARACTERS]
        *words, _ = re.split(r"(?=\s)", text)
        return "".join(words) if "".join(words).strip() else text


def _parts_label(train: Examples) -> str:
    """Names the parts of what is trained on, if there are several."""
    if isinstance(train, DomainTokens):
        return "; domains " + ", ".join(f"{name} ({part.num_tokens:,} tokens)" for name, part in train.parts.items())
    return f"; {train.shares_label()} of the sequences" if isinstance(train, MixedTokens) else ""


class ImageTask(Task):
    """Predict the class of an image."""

    kind = "images"
    remedy = "the images (for digits: the same scikit-learn)"

    def __init__(self, config: Config, images: ImageSplit):
        super().__init__(config)
        self.train, self.validation = images

    @override
    def describe(self) -> str:
        train, held_out = self.train, counted(self.validation.num_sequences, "image")
        return f"images      {train.num_sequences:,} of {train.sequence_length} patches; {held_out} held out"

    @override
    def evaluate(self, world: Communicator, model: EvaluationModel, batch_size: int) -> Evaluation:
        return evaluate_images(world, model, self.validation.windows(batch_size))

    def save(self, run_dir: Path) -> None:
        """Write nothing, since a checkpoint is enough."""


def build_task_in_turn(config: Config, world: Communicator, *, report: Callable[[str], None]) -> Task:
    """`build_task` on the first rank of each node, then on all, which find its result in the cache.

    The others wait for however long it takes. Where there are several nodes, the first ranks open the files once more,
    too: in a folder that nodes share, another may have replaced theirs since.

    Raises DisagreementError, on all ranks, if they do not have the same data.
    """
    is_first = world.nodes.index(world.nodes[world.rank]) == world.rank
    task = build_task(config, report=report) if is_first else None
    world.wait_for_all()
    if task is None or any(world.nodes):
        task = build_task(config, report=report)
    world.wait_for_all()  # checksums of terabytes take longer than a comparison may
    world.agree(of_data(task.train, task.validation, task.vocab_size, task.tokenizer_fingerprint))
    return task


def build_task(config: Config, *, report: Callable[[str], None]) -> Task:
    """Read the data of a config. `report` is given a sentence on what is being done.

    Raises DataError for data that cannot be used.
    """
    if config.data.is_images:
        return ImageTask(config, read_images(config.data))
    return TextTask(config, prepare_data(config.data, report=report))
