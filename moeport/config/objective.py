"""The objective of training on text: the next token, or UL2's mixture of denoisers."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from moeport.core.section import Section

EXTREME_SPAN, EXTREME_RATE = 12, 0.3
"""From this mean length of a span, or this share of corrupted tokens, UL2 calls a denoiser extreme."""
SHORTEST_SEQUENCE = 8
"""Ours: fewest tokens of a sequence in which there is room for a span."""

Mode = Literal["R", "S", "X"]
MODES: tuple[Mode, ...] = ("R", "S", "X")
"""UL2's modes: regular, sequential and extreme."""


@dataclass(frozen=True)
class Layout:
    """How a denoiser fills a sequence; the same for all of its sequences."""

    source: int
    """Tokens of the text that the sequence has."""
    noise: int
    """Those among them that are predicted."""
    spans: int
    """Spans that they form, each with a sentinel of its own; 0 for a prefix, which needs none."""

    @property
    def targets(self) -> int:
        """Tokens that count in the loss: of spans also their sentinels and the end of text."""
        return self.noise + (self.spans + 1 if self.spans else 0)

    @property
    def tokens(self) -> int:
        """Tokens of the whole sequence, without that of its mode."""
        return self.source + (2 * self.spans + 1 if self.spans else 0)


class Denoiser(Section):
    """One of the objectives of a mixture."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """What it is called in metrics."""
    weight: PositiveFloat = 1.0
    """Its share of the sequences, as a part of the sum of all weights."""
    kind: Literal["prefix", "spans"] = "spans"
    """`prefix`: the end of a sequence is predicted from its beginning (prefix LM). `spans`: spans are cut out, and
    predicted after the rest of the text, which has a sentinel in place of each."""
    rate: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """r: share of the tokens of a sequence that are predicted."""
    mean_span: Annotated[float, Field(ge=1)] = 3.0
    """mu, for spans: mean length of a span in tokens."""

    @property
    def mode(self) -> Mode:
        """S for a prefix, X for long spans or many corrupted tokens, otherwise R (UL2)."""
        if self.kind == "prefix":
            return "S"
        return "X" if self.mean_span >= EXTREME_SPAN or self.rate >= EXTREME_RATE else "R"

    def layout(self, room: int) -> Layout:
        """As much text as has room, at least SHORTEST_SEQUENCE tokens, with its sentinels and the end of text."""
        if self.kind == "prefix":
            return Layout(room, self._noise(room), 0)
        longer = range(2, room + 1)  # one token always fits
        return self._spans(1 + bisect_right(longer, room, key=lambda source: self._spans(source).tokens))

    def _noise(self, source: int) -> int:
        return min(max(round(source * self.rate), 1), source - 1)

    def _spans(self, source: int) -> Layout:
        noise = self._noise(source)
        return Layout(source, noise, min(max(round(noise / self.mean_span), 1), noise, source - noise))


OPENMOE = (
    Denoiser(name="prefix", weight=0.5, kind="prefix", rate=0.5),
    *(
        Denoiser(name=f"spans-{span}-{rate:.0%}".rstrip("%"), weight=0.1, rate=rate, mean_span=span)
        for span, rate in ((3, 0.15), (8, 0.15), (3, 0.5), (8, 0.5), (64, 0.5))
    ),
)
"""OpenMoE's mixture (arXiv 2402.01739)."""


class ObjectiveConfig(Section):
    """What the model learns to predict."""

    name: Literal["causal", "ul2"] = "causal"
    """`causal`: next-token prediction. `ul2`: a mixture of denoisers (UL2, arXiv 2205.05131) in a decoder, as in
    OpenMoE, then next-token prediction."""
    denoisers: tuple[Denoiser, ...] = ()
    """ul2: the mixture, a list of mappings with a `name`, a `weight`, a `kind` (prefix, spans), a `rate` and, for
    spans, a `mean_span`. Default: OpenMoE's, half prefix LM with rate 0.5, and a tenth each of spans with mean_span and
    rate (3, 0.15), (8, 0.15), (3, 0.5), (8, 0.5) and (64, 0.5)."""
    mode_tokens: bool = True
    """ul2: begin each sequence with a token of its mode: R, S or X (UL2)."""
    steps: PositiveInt | None = None
    """ul2: number of steps that train with the mixture; later steps are causal. Default: all."""

    @property
    def mixture(self) -> tuple[Denoiser, ...]:
        """`denoisers`, or their default."""
        return self.denoisers or OPENMOE

    @property
    def is_mixture(self) -> bool:
        """Whether there are denoisers."""
        return self.name == "ul2"

    def mixes(self, step: int) -> bool:
        """Whether a step, counted from 0, is trained with the mixture."""
        return self.is_mixture and (self.steps is None or step < self.steps)

    def layouts(self, sequence_length: int) -> list[Layout]:
        """How each denoiser fills a sequence of S inputs and the last target."""
        return [each.layout(sequence_length + 1 - self.mode_tokens) for each in self.mixture]

    def special_tokens(self, sequence_length: int) -> int:
        """Ids that modes and sentinels take, the last ones of the model's vocabulary; 0 for `causal`."""
        if not self.is_mixture:
            return 0
        sentinels = max(layout.spans for layout in self.layouts(sequence_length))
        return sentinels + (len(MODES) if self.mode_tokens else 0)
