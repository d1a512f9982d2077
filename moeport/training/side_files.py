"""The files of a run folder beside its checkpoints: whether they are whole and belong to the run.

None of them is needed to continue, and each is written again on a resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

from pydantic import TypeAdapter, ValidationError

from moeport.config.data import ByteTokenizer as ByteConfig
from moeport.config.schema import Config
from moeport.data import Tokenizer, load_tokenizer
from moeport.data.tokenizer import ByteTokenizer
from moeport.errors import DataError, UserError
from moeport.reading import read_bytes
from moeport.training.checkpoint import Checkpoint
from moeport.training.resumable import changes
from moeport.training.run_dir import (
    CONFIG_FILE,
    METRICS_FILE,
    REPORT_FILE,
    SUMMARY_FILE,
    TOKENIZER_FILE,
    config_of,
    end_of_text,
    read_config,
)
from moeport.training.summary import RunSummary

_SUMMARY = TypeAdapter(RunSummary)
_VALUES = {name: TypeAdapter(hint) for name, hint in get_type_hints(RunSummary).items()}
_REPORT_END = b"</html>"


def read_summary(run_dir: Path) -> RunSummary:
    """The summary of a finished run.

    Raises DataError if it is missing or damaged.
    """
    path = run_dir / SUMMARY_FILE
    try:
        return _SUMMARY.validate_json(read_bytes(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise DataError(
            f"{path}: is not the summary of a run: {f'{where}: ' if where else ''}{fault['msg']}"
        ) from error


def is_of_its_type(name: str, value: object) -> bool:
    """Whether a value of summary.json has the type that its name asks for; an unknown name asks for nothing."""
    try:
        _VALUES[name].validate_python(value)
    except (KeyError, ValidationError):
        return name not in _VALUES
    return True


def read_tokenizer(run_dir: Path, checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with.

    Raises DataError if the file in the folder is missing, damaged, or another one.
    """
    config = config_of(checkpoint)
    if isinstance(config.data.tokenizer, ByteConfig):
        return ByteTokenizer()
    path = run_dir / TOKENIZER_FILE
    remedy = "restore it, or write it again with moeport train CONFIG --resume"
    try:
        tokenizer = load_tokenizer(path, end_of_text(config))
    except DataError as error:
        raise DataError(f"{error}; {remedy}") from error
    if tokenizer.fingerprint != checkpoint.meta.tokenizer:
        raise DataError(f"{path}: is not the tokenizer that {checkpoint.path} was trained with; {remedy}")
    return tokenizer


def faults(config: Config, checkpoint: Checkpoint) -> Iterator[str]:
    """What is wrong with the files of a finished run, a sentence each; nothing if all is well.

    Metrics are not among them, since they cannot be written again; without them there is no report either.
    """
    run_dir = config.run.dir
    for check in (_check_summary, _check_config, _check_tokenizer):
        try:
            check(run_dir, checkpoint)
        except UserError as error:
            yield " ".join(str(error).split())
    if config.metrics.report and (run_dir / METRICS_FILE).is_file() and not _ends_well(run_dir / REPORT_FILE):
        yield f"{run_dir / REPORT_FILE}: is missing or cut off"


def _check_summary(run_dir: Path, checkpoint: Checkpoint) -> None:
    summary, meta = read_summary(run_dir), checkpoint.meta
    if summary.steps != meta.step or (meta.val_loss is not None and summary.val_loss != meta.val_loss):
        raise DataError(f"{run_dir / SUMMARY_FILE}: is not the summary of {checkpoint.path}")


def _check_config(run_dir: Path, checkpoint: Checkpoint) -> None:
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise DataError(f"{path}: is missing")
    other = [change.key for change in changes(read_config(run_dir), checkpoint) if not change.key.startswith("run.")]
    if other:
        raise DataError(f"{path}: is not the config of {checkpoint.path}, where {other[0]} differs")


def _check_tokenizer(run_dir: Path, checkpoint: Checkpoint) -> None:
    if checkpoint.meta.tokenizer:
        tokenizer = load_tokenizer(run_dir / TOKENIZER_FILE, end_of_text(config_of(checkpoint)))
        if tokenizer.fingerprint != checkpoint.meta.tokenizer:
            raise DataError(f"{run_dir / TOKENIZER_FILE}: is not the tokenizer of {checkpoint.path}")


def _ends_well(report: Path) -> bool:
    try:
        return report.read_bytes().rstrip().endswith(_REPORT_END)
    except OSError:
        return False
