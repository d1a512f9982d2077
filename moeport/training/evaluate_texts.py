"""The loss of a language model on texts in files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from moeport.backends.base import EvaluationModel
from moeport.config.data import FilesSource
from moeport.data import Tokenizer
from moeport.data.files import FileReader
from moeport.data.find import find_files
from moeport.data.left_out import LeftOut
from moeport.errors import UserError
from moeport.model.batch import Batch

SCORES = 2**22
"""Scores that are summed at a time in float64: 32 MiB."""
Window = tuple[np.ndarray, np.ndarray, int]
"""Inputs (S,), targets (S,), and how many of the last targets count."""


@dataclass
class TextLoss:
    """The loss on some texts."""

    documents: int = 0
    tokens: int = 0
    """Predicted tokens: those of the texts and the end of each."""
    num_bytes: int = 0
    """UTF-8 bytes of the texts."""
    nats: float = 0.0
    """Sum of the negative log-likelihoods."""

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood in nats per token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood in bits per UTF-8 byte: comparable across tokenizers."""
        return self.nats / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        """e^loss; infinite where that is beyond a float."""
        return math.inf if self.loss >= 700 else math.exp(self.loss)

    def add(self, other: TextLoss) -> None:
        """Add other texts."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.num_bytes += other.num_bytes
        self.nats += other.nats

    def as_json(self) -> dict[str, float | int | None]:
        """All figures by name; null for a perplexity that is infinite."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.num_bytes,
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": None if math.isinf(self.perplexity) else self.perplexity,
        }


@dataclass
class TextLosses:
    """The loss on files, each by itself and all together."""

    context: int
    stride: int
    files: dict[str, TextLoss] = field(default_factory=dict)
    """By path."""
    left_out: list[str] = field(default_factory=list)
    """What was not read, a sentence each."""

    @property
    def total(self) -> TextLoss:
        """Of all files."""
        total = TextLoss()
        for each in self.files.values():
            total.add(each)
        return total

    def as_json(self) -> dict[str, Any]:
        """All figures by name."""
        files = [{"file": path, **loss.as_json()} for path, loss in self.files.items()]
        sizes = {"context": self.context, "stride": self.stride}
        return {**sizes, "files": files, "total": self.total.as_json(), "left_out": self.left_out}


def evaluate_texts(
    model: EvaluationModel,
    tokenizer: Tokenizer,
    paths: Sequence[str],
    context: int,
    stride: int | None = None,
    batch_size: int = 8,
) -> TextLosses:
    """Evaluate on files as the `files` source reads them: one document per text file, or per row.

    Every document stands by itself, between two ends of text, of which the second is predicted. It is cut into windows
    of `context` tokens, one every `stride` tokens, and each token counts in the first window that predicts it.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        paths: files, folders or globs.
        context: most tokens that the model sees at once.
        stride: at most `context`, which is the default: then windows do not overlap, as in the validation of a run.
        batch_size: windows at once; one if a token's experts depend on other tokens of its batch.

    Raises: UserError or DataError for files and options that cannot be used, and for a loss that is not finite.
    """
    stride = context if stride is None else stride
    if not 1 <= stride <= context:
        raise UserError(f"the stride must be at least 1 and at most the context of {context} tokens (got {stride})")
    left_out, reader = LeftOut(), FileReader(FilesSource(paths=tuple(paths)))
    found = TextLosses(context, stride)
    batch_size = batch_size if model.model.is_incremental else 1
    for path in find_files(paths, (), reader.is_readable, reader.kinds, "--text", left_out):
        loss = TextLoss()
        for document in reader.read([path], left_out):
            if document.text:
                windows = _windows(tokenizer, document.text, context, stride)
                tokens, nats = _score(model, windows, batch_size)
                loss.add(TextLoss(1, tokens, document.num_bytes, nats))
        if not math.isfinite(loss.nats):
            raise UserError(
                f"{path}: the loss is {loss.nats}; expected a finite number: the model's parameters or its compute "
                "type are the reason"
            )
        if loss.tokens:
            found.files[path] = loss
    reader.refuse_faults(left_out)
    found.left_out = left_out.lines()
    if not found.files:
        raise UserError(f"--text: there is no text in {', '.join(paths)}")
    return found


def _windows(tokenizer: Tokenizer, text: str, context: int, stride: int) -> Iterator[Window]:
    """The windows of one document."""
    end = np.array([tokenizer.end_of_text])
    tokens = np.concatenate([end, tokenizer.encode_batch([text])[0], end]).astype(np.int64)
    counted = 0
    for first in range(0, len(tokens) - 1, stride):
        last = min(first + context, len(tokens) - 1)
        if last > counted:
            yield tokens[first:last], tokens[first + 1 : last + 1], last - counted
            counted = last


def _score(model: EvaluationModel, windows: Iterable[Window], batch_size: int) -> tuple[int, float]:
    """The number of tokens that count, and the sum of their negative log-likelihoods."""
    tokens, nats, remaining = 0, 0.0, iter(windows)
    while batch := list(islice(remaining, batch_size)):
        for same in _of_equal_length(batch):
            count = sum(counted for _, _, counted in same)
            tokens, nats = tokens + count, nats + _nats(model, same, count)
    return tokens, nats


def _of_equal_length(windows: Sequence[Window]) -> list[list[Window]]:
    """The windows by length, and by how many targets count."""
    groups: dict[tuple[int, int], list[Window]] = {}
    for window in windows:
        groups.setdefault((len(window[0]), window[2]), []).append(window)
    return list(groups.values())


def _nats(model: EvaluationModel, windows: Sequence[Window], count: int) -> float:
    """Of windows of equal length."""
    token_BS, target_BS = (np.stack([window[side] for window in windows]) for side in (0, 1))
    if count == token_BS.size:
        terms = model.evaluate(Batch(token_BS, target_BS))
        return float(model.ops.to_numpy(terms.cross_entropy)) * count
    new = windows[0][2]
    nats = 0.0
    for tokens, target_BC in zip(token_BS, target_BS[:, -new:], strict=True):
        score_CV = model.logits(tokens[None])[0, -new:]
        rows = max(1, SCORES // score_CV.shape[1])
        for first in range(0, new, rows):
            nats += _nats_of_scores(score_CV[first : first + rows], target_BC[first : first + rows])
    return nats


def _nats_of_scores(score_CV: np.ndarray, target_C: np.ndarray) -> float:
    score_CV = score_CV.astype(np.float64)
    top_C1 = score_CV.max(axis=1, keepdims=True)
    log_partition_C = top_C1[:, 0] + np.log(np.exp(score_CV - top_C1).sum(axis=1))
    return float((log_partition_C - score_CV[np.arange(len(target_C)), target_C]).sum())
