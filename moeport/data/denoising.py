"""UL2's mixture of denoisers: sequences of text that are rearranged, and which of their targets count.

UL2: arXiv 2205.05131; spans as in T5 (arXiv 1910.10683); in a decoder, inputs and targets are one
sequence. S is the length of a sequence, B the number of sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from moeport.config.data import shares
from moeport.config.objective import MODES, ObjectiveConfig
from moeport.core.parameters import generator

Denoised = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Inputs (B, S) and targets (B, S), int64, and the weights (B, S) of the targets in the loss, float32."""


class Denoising:
    """Rearranges the sequences of a step; a pure function of the seed, the step and a sequence's position in its batch.

    The number of targets of a sequence follows from its denoiser, and that of each sequence of a step is drawn from
    the seed and the step. So every rank knows the number of targets of the whole step.

    Args:
        config: what the denoisers are.
        sequence_length: S.
        rows: V, the ids of the model; the last ones are those of modes and sentinels.
        end_of_text: the id that ends a text, which also fills the rest of a sequence.
        seed: determines all draws.
    """

    def __init__(self, config: ObjectiveConfig, sequence_length: int, rows: int, end_of_text: int, seed: int):
        self.config, self.sequence_length, self.seed = config, sequence_length, seed
        self._end_of_text = end_of_text
        self.layouts = config.layouts(sequence_length)
        """How each denoiser fills a sequence."""
        modes = MODES if config.mode_tokens else ()
        self.modes = {mode: rows - 1 - number for number, mode in enumerate(modes)}
        """The id of each mode; empty without them."""
        most = max(layout.spans for layout in self.layouts)
        self.sentinels = rows - 1 - len(modes) - np.arange(most)
        """The ids of the sentinels, in the order of the spans."""

    @property
    def names(self) -> list[str]:
        """The denoisers."""
        return [denoiser.name for denoiser in self.config.mixture]

    def chosen(self, step: int, batch_size: int) -> np.ndarray:
        """The number of the denoiser of each sequence of a step, counted from 0, (batch_size,)."""
        ends = np.cumsum(shares(self.config.mixture))
        drawn_B = generator(self.seed, "objective", step).random(batch_size)
        return np.minimum(np.searchsorted(ends, drawn_B, "right"), len(ends) - 1)

    def of_step(
        self, step: int, batch_size: int, first: int, token_BS: np.ndarray, target_BS: np.ndarray
    ) -> Denoised | None:
        """Some sequences of a step; None where the objective is causal.

        The mean weight of all targets of a step is 1, so a mean over tokens, of which each micro-batch has equally
        many, is that over the targets that count.

        Args:
            step: counted from 0.
            batch_size: sequences of the whole step.
            first: position of the first of these in it.
            token_BS: their tokens.
            target_BS: the tokens that follow.
        """
        if not self.config.mixes(step):
            return None
        chosen_B = self.chosen(step, batch_size)
        targets = sum(self.layouts[number].targets for number in chosen_B)
        weight = batch_size * self.sequence_length / targets
        rows = [
            self.rearranged(int(chosen_B[place]), tokens, generator(self.seed, "objective", step, place))
            for place, tokens in enumerate(_windows(token_BS, target_BS), start=first)
        ]
        tokens_BS1, counts_BS1 = (np.stack(arrays) for arrays in zip(*rows, strict=True))
        return tokens_BS1[:, :-1], tokens_BS1[:, 1:], (counts_BS1[:, 1:] * weight).astype(np.float32)

    def held_out(
        self, batches: Iterable[tuple[int, tuple[np.ndarray, np.ndarray]]]
    ) -> Iterator[tuple[int, Denoised, np.ndarray]]:
        """Held-out sequences, which the denoisers take in turn: domain, arrays, and the denoiser of each sequence.

        Args:
            batches: the number of a domain, and its inputs and targets. Batches of shorter sequences are left out.
        """
        place = 0
        for domain, (token_BS, target_BS) in batches:
            if token_BS.shape[1] != self.sequence_length:
                continue
            number_B = (place + np.arange(len(token_BS))) % len(self.layouts)
            rows = [
                self.rearranged(int(number), tokens, generator(self.seed, "objective", "held out", place + row))
                for row, (number, tokens) in enumerate(zip(number_B, _windows(token_BS, target_BS), strict=True))
            ]
            place += len(token_BS)
            tokens_BS1, counts_BS1 = (np.stack(arrays) for arrays in zip(*rows, strict=True))
            yield domain, (tokens_BS1[:, :-1], tokens_BS1[:, 1:], counts_BS1[:, 1:].astype(np.float32)), number_B

    def rearranged(self, number: int, text: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A text as a denoiser shows it.

        Args:
            number: of the denoiser.
            text: S + 1 tokens, of which those from a random place on are taken that have room.
            random: draws the place and the spans.

        Returns: S + 1 tokens, and which of them are predicted.
        """
        layout, denoiser = self.layouts[number], self.config.mixture[number]
        start = int(random.integers(len(text) - layout.source + 1))
        source = text[start : start + layout.source]
        if layout.spans:
            shown, predicted = self._spans(layout.noise, layout.spans, source, random)
        else:
            shown, predicted = source[: -layout.noise], source[-layout.noise :]
        mode = [self.modes[denoiser.mode]] if self.modes else []
        rest = len(text) - len(mode) - len(shown) - len(predicted)
        tokens = np.concatenate([mode, shown, predicted, np.full(rest, self._end_of_text)]).astype(np.int64)
        place = np.arange(len(text)) - len(mode) - len(shown)
        return tokens, (place >= 0) & (place < len(predicted))

    def _spans(
        self, noise: int, spans: int, source: np.ndarray, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The text with a sentinel in place of each span, and each span after its sentinel, then an end of text.

        As in T5, the text begins with a token that stays and ends with a span, and all divisions of both into parts
        are equally likely.
        """
        kept, gone = _parts(len(source) - noise, spans, random), _parts(noise, spans, random)
        lengths = np.stack([kept, gone], axis=1).reshape(-1)
        pieces = np.split(source, np.cumsum(lengths)[:-1])
        marks = self.sentinels[:spans].reshape(-1, 1)
        shown = [x for piece, mark in zip(pieces[::2], marks, strict=True) for x in (piece, mark)]
        predicted = [x for mark, piece in zip(marks, pieces[1::2], strict=True) for x in (mark, piece)]
        return np.concatenate(shown), np.concatenate([*predicted, [self._end_of_text]])


def _parts(total: int, number: int, random: np.random.Generator) -> np.ndarray:
    """A number of lengths of at least 1 whose sum is `total`, (number,); all of them are equally likely."""
    ends = np.sort(random.choice(total - 1, number - 1, replace=False)) + 1
    return np.diff(ends, prepend=0, append=total)


def _windows(token_BS: np.ndarray, target_BS: np.ndarray) -> np.ndarray:
    """Sequences with the last target, (B, S + 1)."""
    return np.concatenate([token_BS[:, :1], target_BS], axis=1)
