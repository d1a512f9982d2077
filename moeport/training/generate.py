"""Sample text from a trained model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moeport.backends import get_backend
from moeport.backends.base import EvaluationModel
from moeport.core.parameters import generator
from moeport.data import Tokenizer
from moeport.errors import UserError
from moeport.model.decoder import DecoderLM
from moeport.training.checkpoint import find_checkpoint, open_checkpoint
from moeport.training.fits import check_parameters, finite
from moeport.training.run_dir import CHECKPOINT_DIR, config_of, read_config
from moeport.training.side_files import read_tokenizer


def generate(
    run_dir: Path | str,
    prompt: str,
    *,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 50,
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
        seed: the same seed gives the same text.
        checkpoint: latest, best or step-N.

    Returns: the added text.

    Raises: UserError or CheckpointError for errors that the user can fix.
    """
    if temperature < 0 or top_k < 1 or max_tokens < 1:
        raise UserError(
            f"temperature must be at least 0, top_k and max_tokens at least 1 "
            f"(got {temperature}, {top_k}, {max_tokens})"
        )
    _check_text(prompt)
    run_dir = Path(run_dir)
    if not (run_dir / CHECKPOINT_DIR).is_dir():
        read_config(run_dir)
    loaded = finite(open_checkpoint(find_checkpoint(run_dir / CHECKPOINT_DIR, checkpoint)))
    config = config_of(loaded)
    if config.data.is_images:
        raise UserError(
            f"{run_dir}: was trained to classify images (data.source.name: {config.data.source.name}) and cannot "
            "continue text; expected the folder of a language model"
        )
    tokenizer = read_tokenizer(run_dir, loaded)
    lm = DecoderLM(config.model, tokenizer.vocab_size)
    check_parameters(loaded, lm.parameter_specs())
    model = get_backend(config.backend.on_any_device()).evaluation_model(lm, loaded.model)
    return sample(model, tokenizer, prompt, config.data.sequence_length, max_tokens, temperature, top_k, seed)


def sample(
    model: EvaluationModel,
    tokenizer: Tokenizer,
    prompt: str,
    context: int,
    max_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> str:
    """Continue `prompt`, which follows an end-of-text token; the model sees the last `context` tokens."""
    random = generator(seed, "sample")
    ids = [tokenizer.end_of_text, *(int(i) for i in tokenizer.encode_batch([prompt])[0])]
    start = len(ids)
    for _ in range(max_tokens):
        logits_V = model.logits(np.array([ids[-context:]]))[0, -1, : tokenizer.vocab_size].astype(np.float64)
        token = _draw(logits_V, temperature, top_k, random)
        if token == tokenizer.end_of_text:
            break
        ids.append(token)
    return tokenizer.continuation(ids[1:], start - 1)


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


def _draw(logits_V: np.ndarray, temperature: float, top_k: int, random: np.random.Generator) -> int:
    order = np.argsort(-logits_V, kind="stable")[:top_k]
    if temperature == 0:
        return int(order[0])
    scaled = logits_V[order] / temperature
    probabilities = np.exp(scaled - scaled[0])
    return int(random.choice(order, p=probabilities / probabilities.sum()))
