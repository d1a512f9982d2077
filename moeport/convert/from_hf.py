"""A folder of the Hugging Face hub to a run folder, tensor by tensor."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moeport.config import config_from_dict
from moeport.config.schema import Config
from moeport.convert.config_in import settings_of
from moeport.convert.deepseek import MTP, MTP_KEYS, prediction_tensors
from moeport.convert.extra import check_extra, known_extra
from moeport.convert.family import Family, family_of
from moeport.convert.floats import DTYPES, decoded
from moeport.convert.folder import CHECKSUMS, Folder, check_tensors, read_folder
from moeport.convert.parts import Layout, Part, parts
from moeport.convert.progress import Report, reported, silent
from moeport.convert.record import Record, read_checksums, refuse_other, write_record
from moeport.convert.rows import blocks_of
from moeport.convert.text import tokenizer_of
from moeport.core.parameters import ParameterSpec
from moeport.data.tokenizer import Tokenizer
from moeport.errors import ConfigError, DataError, RunError, UserError
from moeport.model.decoder import DecoderLM
from moeport.training.checkpoint import save_streamed
from moeport.training.checkpoint_meta import CheckpointMeta
from moeport.training.run_dir import CHECKPOINT_DIR, TOKENIZER_FILE, refuse_used, write_config
from moeport.training.tensor_file import NewTensor
from moeport.version import VERSION


@dataclass(frozen=True)
class Converted:
    """What became of a folder."""

    family: str
    layout: Layout
    parameters: int
    """Number of elements."""
    tensors: int
    """Number of tensors read."""
    notes: tuple[str, ...]
    """What the user should know, a sentence each."""


def from_hf(
    source: Path,
    run_dir: Path,
    *,
    ignored: Collection[str] = (),
    tokenizer: Path | None = None,
    without_tokenizer: bool = False,
    without_mtp: bool = False,
    report: Report = silent,
) -> Converted:
    """Convert a folder to a run with one checkpoint, of step 0.

    Args:
        source: the folder, with config.json and safetensors.
        run_dir: the run folder to make.
        ignored: keys of config.json that are taken to have no effect.
        tokenizer: a tokenizer.json, if the folder has none.
        without_tokenizer: convert although there is no tokenizer.json.
        without_mtp: leave out the layers of multi-token prediction, which moeport does not have.
        report: is told of each parameter that was written.

    Raises:
        UserError: names everything in the folder that is missing, damaged, unknown or cannot be expressed (or
            DataError, which is one); nothing is dropped.
    """
    refuse_used(run_dir)
    refuse_other(run_dir, source)
    folder = read_folder(source)
    family = family_of(folder.config["model_type"])
    _check_counts(folder)
    text, end = tokenizer_of(folder, tokenizer, without_tokenizer)
    config = _config(folder, family, run_dir, ignored, text, end)
    job = Job(_without_prediction(folder, without_mtp), family, config)
    carried: list[str] = []

    def write_others() -> None:
        job.check_sums()
        if text is not None:
            text.save(run_dir / TOKENIZER_FILE)
        carried.extend(write_record(source, run_dir, job.record(ignored)))

    meta = CheckpointMeta(0, 0, None, text.fingerprint if text else None, "", config.model_dump(mode="json"), VERSION)
    save_streamed(run_dir / CHECKPOINT_DIR, meta, reported(job.tensors(), report), write_others)
    write_config(run_dir, config)
    return Converted(
        family.model_type,
        job.layout,
        sum(spec.size for spec in job.specs),
        len(job.folder.tensors),
        (*_left_out(folder, job.folder), *_notes(job, carried)),
    )


@dataclass
class Job:
    """One conversion: the parts of the model, and the checksums of those that were read."""

    folder: Folder
    family: Family
    config: Config
    checksums: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = self.config.model
        self.vocab_size = int(model.vocab_size or 0)
        self.specs = DecoderLM(model, self.vocab_size).parameter_specs()
        self.layout, self.parts = self._parts()
        self.extra = known_extra(self.folder, self.config)
        shapes = {part.tensor: part.shape for part in self.parts}
        shapes |= {name: self.folder.tensors[name].shape for name in self.extra}
        check_tensors(self.folder, shapes, DTYPES)
        for name in self.extra:
            check_extra(self.folder, name, self.config)

    def _parts(self) -> tuple[Layout, list[Part]]:
        """The parts in the layout of which more tensors are there."""

        def present(layout: Layout) -> int:
            return len({part.tensor for part in by_layout[layout]} & self.folder.tensors.keys())

        layouts: tuple[Layout, Layout] = ("experts", "fused")
        by_layout = {layout: parts(self.family, self.config.model, self.vocab_size, layout) for layout in layouts}
        best = max(layouts, key=present)
        return best, by_layout[best]

    def tensors(self) -> list[NewTensor]:
        """The parameters of the checkpoint, each filled by its parts while it is written."""
        by_parameter: dict[str, list[Part]] = defaultdict(list)
        for part in self.parts:
            by_parameter[part.parameter].append(part)
        found = []
        for spec in self.specs:
            own = sorted(by_parameter.pop(spec.name, []), key=lambda part: part.offset)
            if not own and self.family.is_dense and spec.name.endswith("moe.router.weight"):
                found.append(NewTensor(spec.name, "F32", spec.shape, partial(_zeros, spec)))
                continue
            check_cover(spec, own)
            wide = any(self.folder.tensors[part.tensor].dtype == "F64" for part in own)
            code = "F64" if wide else "F32"
            found.append(NewTensor(spec.name, code, spec.shape, partial(self._read, own, code)))
        if by_parameter:
            raise RunError(
                f"{next(iter(by_parameter))}: does not belong to any model of the family {self.family.model_type}"
            )
        return found

    def _read(self, own: Sequence[Part], code: str) -> Iterator[bytes]:
        for part in own:
            tensor, digest = self.folder.tensors[part.tensor], hashlib.sha256()
            for block in blocks_of(tensor, part.start, part.size, part.pairs):
                digest.update(block)
                values = decoded(block, tensor.dtype)
                if not np.isfinite(values).all():
                    raise DataError(f"{tensor.file}: {part.label} holds a NaN or an infinity; use another checkpoint")
                values = part.pairs.to_ours(values) if part.pairs else values
                wide = values.astype("<f8", copy=False) if code == "F64" else values
                yield wide.tobytes()
            self.checksums[part.label] = digest.hexdigest()

    def check_sums(self) -> None:
        """Compare what was read with the checksums beside the weights, if moeport wrote them.

        Raises DataError, which names the first part, such as an expert, that is not what it was.
        """
        file = self.folder.path / CHECKSUMS
        known = read_checksums(file)
        if known is None:
            return
        wrong = [label for label, digest in self.checksums.items() if known.get(label) != digest]
        if wrong:
            more = f" (nor are {len(wrong) - 1} others)" if wrong[1:] else ""
            raise DataError(
                f"{file}: {wrong[0]} is not what was written{more}: the weights are damaged, or were changed; delete "
                "the file if they were changed on purpose"
            )

    def record(self, ignored: Collection[str]) -> Record:
        """What the run remembers of the folder."""
        dtypes = {part.label: self.folder.tensors[part.tensor].dtype for part in self.parts}
        return Record(
            source=str(self.folder.path.resolve()),
            family=self.family.model_type,
            layout=self.layout,
            config={key: value for key, value in self.folder.config.items() if not self._is_own_code(key)},
            dtypes=dtypes,
            extra=self.extra,
            ignored=list(ignored),
            checksums=self.checksums,
        )

    def _is_own_code(self, key: str) -> bool:
        """Whether a key names code that is not carried along, since transformers has the model itself."""
        return key == "auto_map" and self.folder.config[key] == self.family.own_code


def check_cover(spec: ParameterSpec, own: Sequence[Part]) -> None:
    """Refuse parts that leave an element of a parameter unset, or set it twice.

    Args:
        spec: the parameter.
        own: its parts by offset.

    Raises RunError.
    """
    place = 0
    for part in own:
        if part.offset != place:
            what = "is not set" if part.offset > place else "is set twice"
            raise RunError(f"{spec.name}: element {min(place, part.offset)} {what}, before {part.label}")
        place += part.size
    if place != spec.size:
        raise RunError(f"{spec.name}: element {place} of {spec.size} is not set")


def _zeros(spec: ParameterSpec) -> Iterable[bytes]:
    return [bytes(4 * spec.size)]


def _without_prediction(folder: Folder, without_mtp: bool) -> Folder:
    """The folder without its layers of multi-token prediction.

    Raises UserError if it has some, and the user has not said that they are to be left out.
    """
    names = prediction_tensors(folder.tensors, folder.config)
    if names and not without_mtp:
        raise UserError(
            f"{folder.path}: has {len(names)} tensors of multi-token prediction ({MTP}), such as {names[0]}, which "
            "moeport does not have; leave them out with --without-mtp"
        )
    if not names:
        return folder
    kept = {name: tensor for name, tensor in folder.tensors.items() if name not in {*names}}
    return replace(folder, tensors=kept, config=folder.config | dict.fromkeys(folder.config.keys() & {*MTP_KEYS}, 0))


def _left_out(before: Folder, after: Folder) -> Iterator[str]:
    number = len(before.tensors) - len(after.tensors)
    if number:
        yield f"left out: {number} tensors of multi-token prediction; {MTP} is 0 on the way back"
    for key in MTP_KEYS:
        if not number and before.config.get(key):
            yield f"{key} is {before.config[key]}, but the folder has no such layers"


def _check_counts(folder: Folder) -> None:
    """Refuse more layers or experts than the tensors can hold, before all are listed."""
    rows = max((tensor.shape[0] for tensor in folder.tensors.values() if tensor.shape), default=0)
    most = {"num_hidden_layers": len(folder.tensors)}
    most |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), rows)
    for key, limit in most.items():
        number = folder.config.get(key)
        if type(number) is int and number > limit:
            raise DataError(f"{folder.config_file}: {key} is {number}, but the tensors have room for at most {limit}")


def _config(
    folder: Folder, family: Family, run_dir: Path, ignored: Collection[str], tokenizer: Tokenizer | None, end: str
) -> Config:
    """The config of the run; `end` is the token that ends a document."""
    place = str(folder.config_file)
    found = settings_of(family, folder.config, place, ignored)
    values: dict[str, Any] = {
        "run": {"dir": str(run_dir)},
        "model": found.model,
        "training": {"start_from": str(run_dir)},
        "data": {
            "sequence_length": found.sequence_length,
            "tokenizer": {"name": "file", "path": str(run_dir / TOKENIZER_FILE), "end_of_text": end},
        },
    }
    if all(tensor.dtype == "F64" for tensor in folder.tensors.values()):
        values["backend"] = {"dtype": "float64"}
    try:
        config = config_from_dict(values)
    except ConfigError as error:
        raise UserError(f"{place}: describes a model that moeport cannot build:\n{error}") from error
    if tokenizer is not None and tokenizer.vocab_size > int(config.model.vocab_size or 0):
        raise UserError(
            f"{place}: vocab_size is {config.model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} ids; "
            "expected a tokenizer that belongs to the model"
        )
    return config


def _notes(job: Job, carried: Sequence[str]) -> tuple[str, ...]:
    """What the user should know."""
    config: Mapping[str, Any] = job.folder.config
    notes = [f"carried along: {', '.join(carried) or 'no other files'}"]
    if job.folder.left_aside:
        notes.append(f"left aside, since the index does not name them: {', '.join(job.folder.left_aside)}")
    if job.folder.config != job.record(()).config:
        notes.append("auto_map is left out: transformers has this model itself")
    weight = job.config.model.moe.load_balance.coefficient
    if job.family.balance == "aux_loss_alpha" and weight:
        notes.append(f"aux_loss_alpha is model.moe.load_balance.coefficient {weight:.6g}; transformers does not add it")
    if not job.family.is_dense and job.family.balance == "router_aux_loss_coef":
        coefficient = config.get("router_aux_loss_coef", job.family.defaults["router_aux_loss_coef"])
        ours = job.config.model.moe.load_balance.coefficient
        notes.append(
            f"router_aux_loss_coef {coefficient} is model.moe.load_balance.coefficient {ours:.6g}: theirs weighs a sum "
            "over the choices of a token, pooled over layers, and ours a mean over the choices in each layer"
        )
        if not config.get("output_router_logits"):
            notes.append("transformers adds that loss with output_router_logits: true only; moeport always does")
    if config.get("rope_theta") is None and "rope_parameters" not in config:
        notes.append(f"config.json has no rope_theta; transformers takes {job.family.base:g}")
    return tuple(notes)
