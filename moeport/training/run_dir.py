"""The run folder: what may be in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moeport.config import config_from_dict, load_config, resolved_yaml
from moeport.config.data import FileTokenizer
from moeport.config.schema import Config
from moeport.data.tokenizer import END_OF_TEXT
from moeport.errors import UserError
from moeport.files import remove, write_text
from moeport.training.checkpoint import Checkpoint, list_checkpoints

CONFIG_FILE, METRICS_FILE, SUMMARY_FILE = "config.yaml", "metrics.jsonl", "summary.json"
TOKENIZER_FILE, REPORT_FILE = "tokenizer.json", "report.html"
ROUTING_FILE = "routing.json"
CHECKPOINT_DIR, PROFILE_DIR = "checkpoints", "profile"
PROFILE_FILE = "profile.json"


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


def write_config(run_dir: Path, config: Config) -> None:
    """Write the resolved config to the run folder."""
    write_text(run_dir / CONFIG_FILE, resolved_yaml(config))


def remove_results(run_dir: Path) -> None:
    """Delete the summary and the report of a shorter run, which is being continued."""
    for path in (run_dir / SUMMARY_FILE, run_dir / REPORT_FILE):
        if path.exists():
            remove(path)


def read_config(run_dir: Path) -> Config:
    """The config of a run folder; raises UserError if there is none."""
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{run_dir}: not a run folder: it has no {CONFIG_FILE}; expected the run.dir of a training run")
    return load_config(path, recorded=True)


def config_of(checkpoint: Checkpoint) -> Config:
    """The config that a checkpoint was trained with."""
    return config_from_dict(checkpoint.meta.config, recorded=True)


def end_of_text(config: Config) -> str:
    """The token that ends a document."""
    tokenizer = config.data.tokenizer
    return tokenizer.end_of_text if isinstance(tokenizer, FileTokenizer) else END_OF_TEXT


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= leaves(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
