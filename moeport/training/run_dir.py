"""The run folder: what may be in it, and whether a run may be resumed from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeport.config import config_from_dict, load_config, resolved_yaml
from moeport.config.data import FileTokenizer
from moeport.config.schema import Config
from moeport.data.tokenizer import END_OF_TEXT
from moeport.errors import UserError
from moeport.training.checkpoint import Checkpoint, list_checkpoints

CONFIG_FILE, METRICS_FILE, SUMMARY_FILE = "config.yaml", "metrics.jsonl", "summary.json"
TOKENIZER_FILE, REPORT_FILE = "tokenizer.json", "report.html"
CHECKPOINT_DIR, PROFILE_DIR = "checkpoints", "profile"

FIXED_KEYS = (
    "model",
    "data.source",
    "data.tokenizer",
    "data.sequence_length",
    "data.validation_fraction",
    "training.batch_size",
    "training.seed",
)
"""Keys that a resumed run may not change, since it would become another model or see other batches."""


def refuse_used(run_dir: Path) -> None:
    """Refuse a folder that already holds a run, so that nothing is overwritten."""
    used = [name for name in (CONFIG_FILE, METRICS_FILE) if (run_dir / name).exists()]
    steps = [path.name for path in list_checkpoints(run_dir / CHECKPOINT_DIR)]
    if used or steps:
        last = f", last checkpoint {steps[-1]}" if steps else ""
        raise UserError(
            f"run.dir: {run_dir} already holds a run{last}; continue it with --resume, "
            f"or start another with --set run.dir=FOLDER"
        )


def check_resumable(config: Config, checkpoint: Checkpoint) -> list[str]:
    """Compare the config with the checkpoint's.

    Returns: the changes that are allowed, as `key: old -> new`.

    Raises UserError, which names the changes that are not.
    """
    # Through this version's schema: keys that the checkpoint's did not have get their defaults, and paths are expanded.
    before, now = (_leaves(each.model_dump(mode="json")) for each in (config_of(checkpoint), config))
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    changes = {key: f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed}
    fixed = [changes[key] for key in changed if key.startswith(FIXED_KEYS)]
    if fixed:
        raise UserError(
            f"{checkpoint.path}: cannot be resumed with another model or other data: {'; '.join(fixed)}; "
            "restore these keys, or start another run with --set run.dir=FOLDER"
        )
    return [changes[key] for key in changed if not key.startswith("run.")]


def write_config(run_dir: Path, config: Config) -> None:
    """Write the resolved config to the run folder."""
    (run_dir / CONFIG_FILE).write_text(resolved_yaml(config), encoding="utf-8")


def read_config(run_dir: Path) -> Config:
    """The config of a run folder; raises UserError if there is none."""
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{run_dir}: not a run folder: it has no {CONFIG_FILE}; expected the run.dir of a training run")
    return load_config(path)


def config_of(checkpoint: Checkpoint) -> Config:
    """The config that a checkpoint was trained with."""
    return config_from_dict(checkpoint.meta.config)


def end_of_text(config: Config) -> str:
    """The token that ends a document."""
    tokenizer = config.data.tokenizer
    return tokenizer.end_of_text if isinstance(tokenizer, FileTokenizer) else END_OF_TEXT


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _leaves(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
