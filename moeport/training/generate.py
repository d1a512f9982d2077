"""Sample text from a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from moeport.backends.base import EvaluationModel
from moeport.data import Tokenizer
from moeport.errors import UserError
from moeport.training.continued import ContinuedText, Generated, OnText
from moeport.training.sampling import Sampling, draw
from moeport.training.trained import trained_text

BATCH_SIZE = 16
"""Texts that are continued together."""


def generate(
    run_dir: Path | str,
    prompt: str,
    *,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    checkpoint: str = "latest",
) -> str:
    """Continue `prompt` with the model of a run folder.

    Args:
        run_dir: the folder.
        prompt: text to continue; may be empty. The model sees the end of one that is longer than its context.
        max_tokens: maximum number of tokens to add; generation stops earlier at an end of text.
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: sample among this many most likely tokens.
        top_p: of these, among the fewest most likely ones with probabilities that sum to at least this.
        stop: the text ends before the first of these strings.
        seed: the same seed gives the same text.
        checkpoint: latest, best or step-N.

    Returns: the added text.

    Raises: UserError or CheckpointError for errors that the user can fix.
    """
    sampling = Sampling(max_tokens, temperature, top_k, top_p, tuple(stop))
    return next(generate_texts(run_dir, [prompt], sampling, seeds=[seed], checkpoint=checkpoint)).text


def generate_texts(
    run_dir: Path | str,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    *,
    seeds: Sequence[int] = (0,),
    checkpoint: str = "latest",
    batch_size: int = BATCH_SIZE,
    on_text: OnText | None = None,
) -> Iterator[Generated]:
    """Continue several prompts, in batches; each text is what it would be alone.

    Args:
        run_dir: the run folder.
        prompts: texts to continue.
        sampling: how tokens are drawn, and when a text ends.
        seeds: one for all prompts, or one for each; for a single prompt, one for each text that is wanted.
        checkpoint: latest, best or step-N.
        batch_size: maximum number of texts to continue together.
        on_text: is given what is added to a single text, as it comes.

    Returns: the texts in order, each batch as soon as it is done.

    Raises: UserError or CheckpointError for errors that the user can fix.
    """
    pairs = _pairs(prompts, seeds)
    for prompt in prompts:
        _check_text(prompt)
    trained = trained_text(Path(run_dir), checkpoint)
    return continue_texts(
        trained.model, trained.tokenizer, pairs, trained.context, sampling or Sampling(), batch_size, on_text
    )


def continue_texts(
    model: EvaluationModel,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, int]],
    context: int,
    sampling: Sampling,
    batch_size: int = BATCH_SIZE,
    on_text: OnText | None = None,
) -> Iterator[Generated]:
    """Continue prompts, each with its seed. The model sees at most `context` tokens of a text, as `Decoder` says."""
    for first in range(0, len(pairs), batch_size):
        texts = [
            ContinuedText(tokenizer, prompt, seed, sampling, on_text if len(pairs) == 1 else None)
            for prompt, seed in pairs[first : first + batch_size]
        ]
        _continue(model, texts, context, sampling)
        yield from (text.result() for text in texts)


def sample(
    model: EvaluationModel, tokenizer: Tokenizer, prompt: str, context: int, sampling: Sampling, seed: int = 0
) -> str:
    """What is added to one prompt; arguments as of `continue_texts`."""
    return next(continue_texts(model, tokenizer, [(prompt, seed)], context, sampling)).text


def _continue(model: EvaluationModel, texts: Sequence[ContinuedText], context: int, sampling: Sampling) -> None:
    """Continue texts together until all have ended."""
    decoder, running = model.decoder(context), list(texts)
    scores = decoder.start([text.ids for text in running])
    while True:
        for text, scores_V in zip(running, scores, strict=True):
            text.add(draw(scores_V[: text.tokenizer.vocab_size], sampling, text.random))
        going = [index for index, text in enumerate(running) if text.finish is None]
        if not going:
            return
        if len(going) < len(running):
            decoder.keep(going)
            running = [running[index] for index in going]
        scores = decoder.step([text.ids[-1] for text in running])


def _pairs(prompts: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Every prompt with its seed."""
    if len(seeds) == 1:
        return [(prompt, seeds[0]) for prompt in prompts]
    if len(prompts) == 1:
        return [(prompts[0], seed) for seed in seeds]
    if len(prompts) != len(seeds):
        raise UserError(
            f"there are {len(prompts)} prompts and {len(seeds)} seeds; expected one seed, or one for each prompt"
        )
    return list(zip(prompts, seeds, strict=True))


def _check_text(prompt: str) -> None:
    """Refuse a prompt that has no UTF-8: Python passes on bytes of the command line that are no text as surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        code = ord(prompt[error.start])
        found = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half of a pair, U+{code:04X}"
        raise UserError(
            f"prompt: is not text: {found} stands after {error.start:,} characters; expected text in UTF-8"
        ) from error
