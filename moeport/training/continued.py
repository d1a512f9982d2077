"""One text that is being continued: its tokens, what they say, and whether it has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moeport.core.parameters import generator
from moeport.data import Tokenizer
from moeport.training.sampling import Sampling

Finish = Literal["length", "end_of_text", "stop"]
"""Why a text has ended: it has the wanted number of tokens, the model ended it, or a stop string came."""
OnText = Callable[[str], None]
"""Is given a text piece by piece."""


@dataclass(frozen=True)
class Generated:
    """A text that a model has continued."""

    prompt: str
    text: str
    """What was added."""
    seed: int
    tokens: int
    """Number of tokens that were added, including those of a stop string, but not the end of text."""
    finish: Finish
    """Why it ended."""


class ContinuedText:
    """A prompt after an end of text, and what is added to it.

    Args:
        tokenizer: of the model.
        prompt: the text to continue.
        seed: of the draws of this text, which depend on no other text.
        sampling: when the text ends.
        on_text: is given the text as it comes; what may yet change or be cut is held back.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str, seed: int, sampling: Sampling, on_text: OnText | None = None):
        self.tokenizer, self.prompt, self.seed, self.sampling, self.on_text = tokenizer, prompt, seed, sampling, on_text
        self.random = generator(seed, "sample")
        self.ids = [tokenizer.end_of_text, *(int(token) for token in tokenizer.encode_batch([prompt])[0])]
        self.start = len(self.ids)
        self.finish: Finish | None = None
        self.shown = 0
        """Number of characters that were given to `on_text`."""

    def add(self, token: int) -> None:
        """Add a token, after which the text may have ended."""
        if token == self.tokenizer.end_of_text:
            self.finish = "end_of_text"
        else:
            self.ids.append(token)
            if len(self.ids) - self.start == self.sampling.max_tokens:
                self.finish = "length"
        if not self.sampling.stop and self.on_text is None:
            return
        decoded = self._decoded()
        end = self._end(decoded)
        if end is not None and self.finish != "end_of_text":
            self.finish = "stop"
        if self.on_text is not None:
            self._show(self.on_text, decoded[:end])

    def result(self) -> Generated:
        """The text, once it has ended."""
        assert self.finish is not None
        text = self._decoded()
        text = text[: self._end(text)]
        return Generated(self.prompt, text, self.seed, len(self.ids) - self.start, self.finish)

    def _decoded(self) -> str:
        """What was added, decoded together with the prompt."""
        return self.tokenizer.continuation(self.ids[1:], self.start - 1)

    def _end(self, text: str) -> int | None:
        """Where the first stop string begins; None: there is none."""
        found = [place for stop in self.sampling.stop if (place := text.find(stop)) >= 0]
        return min(found, default=None)

    def _show(self, on_text: OnText, text: str) -> None:
        if self.finish is None:
            text = text[: self._certain(text)]
        if len(text) > self.shown:
            on_text(text[self.shown :])
            self.shown = len(text)

    def _certain(self, text: str) -> int:
        """Number of characters that no later token changes: without an unfinished one or a stop string's beginning."""
        certain = len(text.rstrip("\ufffd"))
        for stop in self.sampling.stop:
            begun = next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)
            certain = min(certain, len(text) - begun)
        return certain
