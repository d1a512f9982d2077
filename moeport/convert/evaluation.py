"""Evaluation of a run or of a folder of the Hugging Face hub: on texts, and on tasks by lm-evaluation-harness."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeport.backends import get_backend
from moeport.config.training import BackendConfig
from moeport.convert.export_options import ExportOptions
from moeport.convert.folder import CONFIG, read_object
from moeport.convert.from_hf import from_hf
from moeport.convert.to_hf import to_hf
from moeport.errors import UserError
from moeport.optional import load
from moeport.tokenizers.folder import has_our_code
from moeport.training.evaluate_texts import TextLosses, evaluate_texts
from moeport.training.run_dir import CHECKPOINT_DIR
from moeport.training.trained import TrainedText, trained_text


@dataclass(frozen=True)
class TaskOptions:
    """How lm-evaluation-harness evaluates."""

    include_path: Path | None = None
    """Folder with the YAML files of further tasks."""
    num_fewshot: int | None = None
    """Examples before each question; None: as the task says."""
    limit: int | None = None
    """Questions of each task; None: all."""
    batch_size: int = 8
    device: str | None = None
    """Device of PyTorch; None: this machine's, as for runs."""


def evaluate(
    place: Path | str,
    texts: Sequence[str],
    *,
    checkpoint: str = "latest",
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    backend: str | None = None,
    tokenizer: Path | None = None,
) -> TextLosses:
    """Loss, bits per byte and perplexity of a model on texts.

    Args:
        place: a run folder, or a folder of the Hugging Face hub, which is converted into a temporary run.
        texts: files, folders or globs.
        checkpoint: latest, best or step-N of a run.
        context: most tokens that the model sees at once; None: data.sequence_length.
        stride: tokens between the starts of windows; None: `context`.
        batch_size: windows at once.
        backend: name of the backend; None: that of the run, on a device of this machine.
        tokenizer: a tokenizer.json, if the folder of the hub has none.

    Raises: UserError, DataError or CheckpointError for what the user can fix.
    """
    with opened(place, checkpoint=checkpoint, backend=backend, tokenizer=tokenizer) as trained:
        context = trained.context if context is None else context
        return evaluate_texts(trained.model, trained.tokenizer, texts, context, stride, batch_size)


@contextmanager
def opened(
    place: Path | str, *, checkpoint: str = "latest", backend: str | None = None, tokenizer: Path | None = None
) -> Iterator[TrainedText]:
    """A language model to evaluate, for as long as it is needed; arguments as of `evaluate`."""
    chosen = None if backend is None else BackendConfig.model_validate({"name": backend})
    with run_of(Path(place), tokenizer, checkpoint) as run_dir:
        yield trained_text(run_dir, checkpoint, "be evaluated on text", chosen)


def evaluate_tasks(
    place: Path | str, tasks: Sequence[str], *, checkpoint: str = "latest", options: TaskOptions | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate tasks of lm-evaluation-harness, with its model `hf` on PyTorch.

    Args:
        place: a run folder, which is exported to a temporary folder for transformers, or a folder of the hub.
        tasks: names of tasks.
        checkpoint: latest, best or step-N of a run.
        options: how they are evaluated.

    Returns: the harness's results by task, such as `{"acc,none": 0.5, ...}`.

    Raises: UserError if the harness is not installed, or a task is unknown; also as `to_hf`.
    """
    harness, options = _harness(), options or TaskOptions()
    manager = harness.TaskManager(include_path=None if options.include_path is None else str(options.include_path))
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown:
        raise UserError(
            f"--tasks: lm-evaluation-harness has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them, and "
            "--tasks-path FOLDER adds those of a folder"
        )
    with _folder_of(Path(place), checkpoint) as folder:
        found: Mapping[str, Any] = harness.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": "auto", **_trust(folder)},
            tasks=list(tasks),
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
            device=options.device or get_backend(BackendConfig(name="torch", dtype="float32")).device.split()[0],
            limit=options.limit,
            task_manager=manager,
            log_samples=False,
        )
    return {name: dict(values) for name, values in found["results"].items()}


def _harness() -> Any:
    lm_eval, _, tasks = (
        load(f"lm_eval{module}", "--tasks", "eval", package="lm-eval")
        for module in ("", ".models.huggingface", ".tasks")
    )
    lm_eval.TaskManager = tasks.TaskManager
    return lm_eval


def _trust(folder: Path) -> dict[str, bool]:
    """Lets transformers run the code beside our tokenizers, which is moeport's own; no other code."""
    ours = has_our_code(folder) and "auto_map" not in read_object(folder / CONFIG)
    return {"trust_remote_code": True} if ours else {}


def is_of_hub(place: Path) -> bool:
    """Whether a folder is one of the Hugging Face hub, and no run."""
    return (place / CONFIG).is_file() and not (place / CHECKPOINT_DIR).is_dir()


@contextmanager
def run_of(place: Path, tokenizer: Path | None, checkpoint: str = "latest") -> Iterator[Path]:
    """A run folder for as long as it is needed.

    Args:
        place: a run folder, or a folder of the hub, which is converted into a temporary run.
        tokenizer: a tokenizer.json, if the folder of the hub has none.
        checkpoint: which of the run is wanted; a folder of the hub has only one.

    Raises: UserError for a checkpoint that a folder of the hub does not have; and as of `from_hf`.
    """
    if not is_of_hub(place):
        yield place
        return
    if checkpoint != "latest":
        raise UserError(
            f"--checkpoint {checkpoint}: {place} is a folder of the Hugging Face hub, which has one checkpoint; "
            "expected latest"
        )
    with tempfile.TemporaryDirectory(prefix="moeport-eval-") as folder:
        run_dir = Path(folder, "run")
        from_hf(place, run_dir, tokenizer=tokenizer)
        yield run_dir


@contextmanager
def _folder_of(place: Path, checkpoint: str) -> Iterator[Path]:
    """A folder that transformers opens, for as long as it is needed."""
    if is_of_hub(place):
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="moeport-eval-") as folder:
        target = Path(folder, "hf")
        to_hf(place, target, ExportOptions(checkpoint=checkpoint))
        yield target
