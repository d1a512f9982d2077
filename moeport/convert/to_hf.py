"""A run to a folder as `save_pretrained` of transformers writes it, tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moeport.config.data import ByteTokenizer as ByteConfig
from moeport.config.schema import Config
from moeport.convert.config_out import Difference, balance_differs, differences, fitting, keys_of, unsaid
from moeport.convert.deepseek import MTP_KEYS
from moeport.convert.export_options import ExportOptions
from moeport.convert.family import Family, family_of
from moeport.convert.floats import CODES, DTYPES, decoded, encoded
from moeport.convert.folder import CHECKSUMS, CONFIG, INDEX, WEIGHTS, copy_carried
from moeport.convert.from_hf import check_cover
from moeport.convert.parts import CHOICE_BIAS, Part, parts
from moeport.convert.progress import Report, reported, silent
from moeport.convert.record import FILE, FOLDER, Record, checksums_text, find_record
from moeport.core.parameters import ParameterSpec
from moeport.core.weights import Weights
from moeport.data.tokenizer import ByteTokenizer, load_tokenizer
from moeport.errors import CheckpointError, RunError, UserError
from moeport.files import atomic_folder
from moeport.model.decoder import DecoderLM
from moeport.tokenizers.folder import add_code, write_tokenizer
from moeport.training.checkpoint import find_checkpoint, open_checkpoint
from moeport.training.checkpoint_meta import CheckpointMeta
from moeport.training.run_dir import CHECKPOINT_DIR, TOKENIZER_FILE, config_of, end_of_text, read_config
from moeport.training.tensor_file import NewTensor, write_tensors

EMBEDDING = "embedding.weight"


@dataclass(frozen=True)
class Exported:
    """What was written."""

    family: str
    tensors: int
    files: int
    """Number of files with tensors."""
    verified: bool
    """Whether every part has the checksum that it had when it was converted to moeport."""
    notes: tuple[str, ...]
    """What the user should know, a sentence each."""


def to_hf(run_dir: Path, target: Path, options: ExportOptions | None = None, report: Report = silent) -> Exported:
    """Convert a checkpoint of a run to a folder, which appears once it is complete.

    Raises:
        UserError: the model has something that no family of transformers has, which is named with the nearest.
        CheckpointError: the checkpoint is damaged.
        RunError: a written part is not what was once read.
    """
    options = options or ExportOptions()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: already exists; choose another folder, or remove it")
    if not (run_dir / CHECKPOINT_DIR).is_dir():
        read_config(run_dir)
    checkpoint = open_checkpoint(find_checkpoint(run_dir / CHECKPOINT_DIR, options.checkpoint))
    config = config_of(checkpoint)
    if config.data.is_images:
        raise UserError(f"{run_dir}: was trained to classify images; expected the run of a language model")
    found = find_record(run_dir, config)
    record, carried = found or (None, None)
    export = Export(run_dir, config, checkpoint.meta, checkpoint.model, record, options)
    with atomic_folder(target) as folder:
        files = export.write_weights(folder, report)
        verified = export.verify()
        (folder / CONFIG).write_text(export.config_text(), encoding="utf-8")
        (folder / CHECKSUMS).write_text(json.dumps(checksums_text(export.checksums)) + "\n", encoding="utf-8")
        _carry(run_dir, config, carried, folder)
    notes = [f"only moeport uses {line}; config.json cannot say it" for line in unsaid(config.model, export.family)]
    return Exported(export.family.model_type, len(export.names), files, verified, tuple(notes))


@dataclass
class Export:
    """One conversion: the parts of the model, and the checksums of those that were written."""

    run_dir: Path
    config: Config
    meta: CheckpointMeta
    stored: Weights
    record: Record | None
    options: ExportOptions
    checksums: dict[str, str] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    """Element type in which each part was written, by label."""

    def __post_init__(self) -> None:
        model = self.config.model
        self.vocab_size = self._vocab_size()
        self.specs = DecoderLM(model, self.vocab_size).parameter_specs()
        _check_stored(self.stored, self.specs, self.run_dir)
        self.family, self.keys = self._family()
        layout = self.options.layout or (self.record.layout if self.record else "experts")
        self.parts = parts(self.family, model, self.vocab_size, layout)
        self._check_parts()
        self.names = list(dict.fromkeys(part.tensor for part in self.parts)) + self._extra()

    def _vocab_size(self) -> int:
        if EMBEDDING not in self.stored:
            raise CheckpointError(f"{self.run_dir}: the checkpoint has no {EMBEDDING}; use another one")
        return self.config.model.vocab_size or self.stored.shape(EMBEDDING)[0]

    def _family(self) -> tuple[Family, dict[str, Any]]:
        """The family, and the keys of config.json. Raises UserError if it lacks something that the model has."""
        model, length = self.config.model, self.config.data.sequence_length
        wanted = self.options.family or (self.record.family if self.record else None)
        family, lacking = fitting(model, self.vocab_size, length)
        if wanted is not None:
            chosen = family_of(wanted)
            own = differences(chosen, model, self.vocab_size, keys_of(chosen, model, self.vocab_size, length))
            if self.options.family or not own:
                family, lacking = chosen, own
        if lacking:
            raise UserError(_refusal(family, lacking, bool(self.options.family)))
        return family, keys_of(family, model, self.vocab_size, length)

    def _check_parts(self) -> None:
        """Every parameter is written whole, except the router of a single expert, whose gate is always 1."""
        own: dict[str, list[Part]] = {}
        for part in self.parts:
            own.setdefault(part.parameter, []).append(part)
        for spec in self.specs:
            if not (self.family.is_dense and spec.name.endswith("moe.router.weight")):
                check_cover(spec, sorted(own.get(spec.name, []), key=lambda part: part.offset))

    def _extra(self) -> list[str]:
        """The head of a tied embedding, where the folder had a copy of it."""
        has_copy = self.record is not None and "lm_head.weight" in self.record.extra
        return ["lm_head.weight"] if has_copy and self.config.model.tie_embeddings else []

    def code_of(self, *labels: str) -> str:
        """Element type of a tensor of these parts: theirs, or one that holds each of theirs exactly.

        The bias that routers choose by is not narrowed, as in transformers: 16 bits would lose most of its updates.
        """
        if self.options.dtype is not None:
            code = CODES[self.options.dtype]
            return "F32" if code in ("BF16", "F16") and labels[0].endswith(CHOICE_BIAS) else code
        default = CODES[self.stored.dtype(EMBEDDING)]
        codes = {self.record.dtypes.get(label, default) if self.record else default for label in labels}
        return codes.pop() if len(codes) == 1 else "F64" if "F64" in codes else "F32"

    def write_weights(self, folder: Path, report: Report) -> int:
        """Write all tensors, in files of at most the chosen size; returns the number of files."""
        tensors = reported(self._tensors(), report)
        shards: list[list[NewTensor]] = [[]]
        size = 0
        for tensor in tensors:
            if shards[-1] and size + tensor.num_bytes > self.options.shard_size:
                shards.append([])
                size = 0
            shards[-1].append(tensor)
            size += tensor.num_bytes
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, 1):
            name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            write_tensors(folder / name, shard, {"format": "pt"})
            weight_map |= {tensor.name: name for tensor in shard}
        if len(shards) > 1:
            total = sum(tensor.num_bytes for tensor in tensors)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return len(shards)

    def _tensors(self) -> list[NewTensor]:
        own: dict[str, list[Part]] = {}
        for part in self.parts:
            own.setdefault(part.tensor, []).append(part)
        if "lm_head.weight" in self.names and "lm_head.weight" not in own:
            own["lm_head.weight"] = own["model.embed_tokens.weight"]
        found = []
        for name, several in own.items():
            several = sorted(several, key=lambda part: part.start)
            code = self.code_of(*(part.label for part in several))
            found.append(NewTensor(name, code, several[0].shape, partial(self._write, several, code)))
        return found

    def _write(self, several: Sequence[Part], code: str) -> Iterator[bytes]:
        for part in several:
            digest = hashlib.sha256()
            for values in self._values(part):
                out = encoded(values, code)
                if not np.isfinite(decoded(out, code)).all():
                    raise CheckpointError(_not_finite(part, values, code))
                digest.update(out)
                yield out
            self.checksums[part.label], self.codes[part.label] = digest.hexdigest(), code

    def _values(self, part: Part) -> Iterator[np.ndarray]:
        """The elements of a part in the order of their tensor; whole heads at a time if some rows are in pairs."""
        if part.pairs is None:
            yield from self.stored.run(part.parameter, part.offset, part.size)
            return
        for place, step in part.pairs.heads(part.size):
            values = np.concatenate([*self.stored.run(part.parameter, part.offset + place, step)])
            yield part.pairs.to_theirs(values)

    def verify(self) -> bool:
        """Compare what was written with what was once read, unless it was trained or is of another type.

        Raises RunError, which names the first part, such as an expert, that differs.
        """
        record = self.record
        untouched = self.meta.step == 0 and (self.run_dir / FOLDER / FILE).is_file()
        if record is None or not record.checksums or not untouched or record.family != self.family.model_type:
            return False
        same = {label for label, code in self.codes.items() if code == record.dtypes.get(label)}
        wrong = [label for label in same if self.checksums[label] != record.checksums.get(label)]
        if wrong:
            raise RunError(f"{min(wrong)}: is not what was read from {record.source}; convert it again")
        return len(same) == len(self.checksums)

    def config_text(self) -> str:
        """config.json: that of the folder, as far as it still holds, with the keys that differ."""
        family, record = self.family, self.record
        if record is None or record.family != family.model_type:
            ids = {key: value for key, value in (record.config if record else {}).items() if key.endswith("_token_id")}
            base = {"architectures": [family.architecture], "model_type": family.model_type}
            return _json({**base, "dtype": DTYPES[self.code_of(self.parts[0].label)], **self.keys, **ids})
        kept = {key: value for key, value in record.config.items() if key not in record.ignored}
        model = self.config.model
        if differences(family, model, self.vocab_size, kept) or balance_differs(family, model, kept):
            renamed = {"rope_theta", "rope_scaling", "num_experts", "num_local_experts", *MTP_KEYS}
            kept = {key: value for key, value in record.config.items() if key not in renamed} | self.keys
            kept["max_position_embeddings"] = record.config.get(
                "max_position_embeddings", self.keys["max_position_embeddings"]
            )
        else:
            kept = dict(record.config)
        if self.options.dtype is not None:
            kept["torch_dtype" if "torch_dtype" in kept else "dtype"] = self.options.dtype
        return _json(kept)


def _carry(run_dir: Path, config: Config, carried: Path | None, folder: Path) -> None:
    """Write the files beside the weights: those of the folder that was converted, or the run's tokenizer."""
    if carried is not None:
        copy_carried(carried, folder)
        (folder / FILE).unlink(missing_ok=True)
        add_code(folder)
    elif isinstance(config.data.tokenizer, ByteConfig):
        write_tokenizer(folder, ByteTokenizer().definition, end_of_text(config))
    elif (run_dir / TOKENIZER_FILE).is_file():
        tokenizer = load_tokenizer(run_dir / TOKENIZER_FILE, end_of_text(config))
        write_tokenizer(folder, tokenizer.definition, end_of_text(config))


def _check_stored(stored: Weights, specs: Iterable[ParameterSpec], run_dir: Path) -> None:
    """Refuse a checkpoint whose parameters are not those of its config."""
    shapes = {spec.name: spec.shape for spec in specs}
    wrong = sorted(stored.keys() ^ shapes.keys())
    wrong += [name for name, shape in shapes.items() if name in stored and stored.shape(name) != shape]
    wrong += [name for name in stored if stored.dtype(name) not in ("float32", "float64")]
    if wrong:
        raise CheckpointError(
            f"{run_dir}: the checkpoint does not fit the model of its config: {wrong[0]} is missing, unknown, or of "
            "another shape or type; use another checkpoint"
        )


def _refusal(family: Family, lacking: Sequence[Difference], chosen: bool) -> str:
    what = "the family that was asked for" if chosen else "the closest family"
    listed = "; ".join(map(str, lacking))
    return (
        f"{family.model_type}, {what}, cannot express this model: {listed}. Train or upcycle to what it has, or keep "
        "the checkpoint in moeport's format"
    )


def _not_finite(part: Part, values: np.ndarray, code: str) -> str:
    if np.isfinite(values).all():
        return f"{part.label}: {np.abs(values).max():.4g} is too large for {DTYPES[code]}; choose another --dtype"
    return f"{part.label}: holds a NaN or an infinity: the run had diverged; use an earlier checkpoint"


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
