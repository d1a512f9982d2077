"""A trained language model, from a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moeport.backends import get_backend
from moeport.backends.base import EvaluationModel
from moeport.config.schema import Config
from moeport.config.training import BackendConfig
from moeport.data import Tokenizer
from moeport.errors import UserError
from moeport.model.decoder import DecoderLM
from moeport.training.checkpoint import Checkpoint, find_checkpoint, open_checkpoint
from moeport.training.fits import check_parameters, finite
from moeport.training.run_dir import CHECKPOINT_DIR, config_of, read_config
from moeport.training.side_files import read_tokenizer


@dataclass(frozen=True)
class OpenedText:
    """A checkpoint of a language model, and what belongs to it."""

    checkpoint: Checkpoint
    config: Config
    """What it was trained with."""
    tokenizer: Tokenizer
    lm: DecoderLM
    """Its shapes."""


@dataclass(frozen=True)
class TrainedText:
    """A language model on this machine's device, and what belongs to it."""

    model: EvaluationModel
    tokenizer: Tokenizer
    config: Config
    """What it was trained with."""
    checkpoint: str
    """Name of the checkpoint, such as step-000100."""

    @property
    def context(self) -> int:
        """Most tokens that the model sees at once: as many as in training."""
        return self.config.data.sequence_length


def trained_text(
    run_dir: Path,
    checkpoint: str = "latest",
    purpose: str = "continue text",
    backend: BackendConfig | None = None,
) -> TrainedText:
    """Read a checkpoint, and place its model on a device.

    Args:
        run_dir: the run folder.
        checkpoint: latest, best or step-N.
        purpose: what a model of images cannot do, for the message.
        backend: what computes; None: the backend of the run, on any device of this machine.

    Raises: UserError or CheckpointError for errors that the user can fix.
    """
    opened = opened_text(run_dir, checkpoint, purpose)
    weights, config = opened.checkpoint.model, opened.config
    model = get_backend(backend or config.backend.on_any_device()).evaluation_model(opened.lm, weights)
    return TrainedText(model, opened.tokenizer, config, opened.checkpoint.path.name)


def opened_text(run_dir: Path, checkpoint: str = "latest", purpose: str = "continue text") -> OpenedText:
    """Open a checkpoint of a language model without reading its arrays. Arguments and errors as of `trained_text`."""
    if not (run_dir / CHECKPOINT_DIR).is_dir():
        read_config(run_dir)
    loaded = finite(open_checkpoint(find_checkpoint(run_dir / CHECKPOINT_DIR, checkpoint)))
    config = config_of(loaded)
    if config.data.is_images:
        raise UserError(
            f"{run_dir}: was trained to classify images (data.source.name: {config.data.source.name}) and cannot "
            f"{purpose}; expected the folder of a language model"
        )
    tokenizer = read_tokenizer(run_dir, loaded)
    lm = DecoderLM(config.model, tokenizer.vocab_size)
    check_parameters(loaded, lm.parameter_specs())
    return OpenedText(loaded, config, tokenizer, lm)
