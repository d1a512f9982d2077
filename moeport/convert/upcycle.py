"""A mixture-of-experts model from a trained one: dense blocks become experts, experts become finer, routers change.

Sparse Upcycling (Komatsuzaki et al., arXiv 2212.05055) copies a dense block into every expert. Cut into G slices of its
hidden units, it becomes G experts per copy (He et al., arXiv 2410.07524): the slices of a copy stand next to each other
and share a row of the router, so that a token gets all of them, and the sum of their outputs is that of the block.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moeport.config import load_config
from moeport.config.schema import Config
from moeport.convert.progress import Report, reported, silent
from moeport.convert.record import find_record, refuse_other, write_record
from moeport.convert.upcycle_plan import Plan, UpcycleOptions, slices_of
from moeport.errors import UserError
from moeport.training.checkpoint import find_checkpoint, open_checkpoint, save_streamed
from moeport.training.checkpoint_meta import CheckpointMeta
from moeport.training.run_dir import CHECKPOINT_DIR, CONFIG_FILE, TOKENIZER_FILE, read_config, refuse_used, write_config
from moeport.version import VERSION


@dataclass(frozen=True)
class Upcycled:
    """What was made."""

    config: Config
    slices: int
    """Experts that a feed-forward block of the source was cut into, G."""
    is_same: bool
    """Whether the new model computes what the source did."""


def upcycle(
    source: Path,
    run_dir: Path,
    overrides: Sequence[str],
    options: UpcycleOptions | None = None,
    report: Report = silent,
) -> Upcycled:
    """Make a run whose model is the source's with other experts or another router.

    Args:
        source: a run folder, such as a converted one.
        run_dir: the run folder to make.
        overrides: `model.moe.*` keys of the new model, as of `--set`.
        options: what the source does not say.
        report: is told of each parameter that was written.

    Raises UserError if the new model cannot be made from the source.
    """
    options = options or UpcycleOptions()
    refuse_used(run_dir)
    refuse_other(run_dir, source)
    if not (source / CONFIG_FILE).is_file():
        raise UserError(
            f"{source}: is not a run folder: it has no {CONFIG_FILE}; expected one, as moeport convert makes it"
        )
    old = read_config(source)
    if old.data.is_images:
        raise UserError(f"{source}: was trained to classify images; expected the run of a language model")
    checkpoint = open_checkpoint(find_checkpoint(source / CHECKPOINT_DIR, options.checkpoint))
    plan = Plan(old.model, _new_config(source, run_dir, old, overrides), checkpoint.model, options)
    tensors = reported(plan.tensors(), report)
    found = find_record(source, old)

    def write_others() -> None:
        if (source / TOKENIZER_FILE).is_file():
            shutil.copyfile(source / TOKENIZER_FILE, run_dir / TOKENIZER_FILE)
        if found is not None:
            record, folder = found
            write_record(folder, run_dir, replace(record, checksums={}))  # the weights are no longer those

    new_meta = CheckpointMeta(0, 0, None, checkpoint.meta.tokenizer, "", plan.config.model_dump(mode="json"), VERSION)
    save_streamed(run_dir / CHECKPOINT_DIR, new_meta, tensors, write_others)
    write_config(run_dir, plan.config)
    return Upcycled(plan.config, plan.slices, plan.is_same)


def _new_config(source: Path, run_dir: Path, old: Config, overrides: Sequence[str]) -> Config:
    """The config of the new run: the source's with the overrides, and an output scaled by the number of slices."""
    path = source / CONFIG_FILE
    given = [f"run.dir={run_dir}", f"training.start_from={run_dir}"]
    if old.model.moe.num_experts == 1:
        given += [f"model.dense_hidden={old.model.moe.expert_hidden}", "model.moe.load_balance.coefficient=null"]
    elif len(old.model.moe_layers) < old.model.num_layers:
        given.append(f"model.dense_hidden={old.model.dense_width}")
    config = load_config(path, [*given, *overrides])
    slices = slices_of(old.model, config.model)
    if slices > 1 and not any("routed_scaling_factor" in text for text in overrides):
        scale = old.model.moe.routed_scaling_factor * slices
        config = load_config(path, [*given, *overrides, f"model.moe.routed_scaling_factor={scale}"])
    return config
