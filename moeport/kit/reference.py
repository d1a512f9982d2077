"""The recording that comes with moeport: a small model on a CPU, in float32 and, with the same routing, in float64.

`python -m moeport.kit.reference FILE` makes it again. moeport/kit/reference.zip is what that wrote.
"""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from dataclasses import replace
from pathlib import Path

from moeport.config import config_from_dict
from moeport.files import atomic_file
from moeport.kit.corpus import training, write_corpus
from moeport.parity.bundle import load_bundle, save_bundle
from moeport.parity.record import record
from moeport.parity.recording import Recording, kept_kinds
from moeport.parity.subject import Size, build_subject

FILE = Path(__file__).with_name("reference.zip")
SIZE = Size(sequences=2, tokens=16, steps=3)
SAMPLE_SIZE = 128
"""Entries kept of a larger tensor, which keeps the file small."""
VARIANTS = {"float32": "torch-cpu:fp32", "float64": "torch-cpu:fp64"}
"""By the folder that the bundle is in."""
PRIVATE = ("platform", "machine", "variables")
"""Keys of an environment that describe the machine that recorded."""


def record_reference(target: Path) -> None:
    """Record both bundles and write them as one file."""
    with tempfile.TemporaryDirectory() as name, chdir(name):
        folder = Path(name)
        write_corpus(folder)
        first = record_variant(VARIANTS["float32"])
        golden = record_variant(VARIANTS["float64"], replay=first, steps=0)
        for label, recording in (("float32", first), ("float64", golden)):
            kept = {key: value for key, value in recording.environment.items() if key not in PRIVATE}
            save_bundle(replace(recording, environment=kept), folder / label)
        with (
            atomic_file(target) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file,
        ):
            for path in sorted(folder.glob("float*/*")):
                entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())  # without the time of today
                entry.compress_type = zipfile.ZIP_DEFLATED
                file.writestr(entry, path.read_bytes(), compresslevel=9)


def record_variant(variant: str, replay: Recording | None = None, steps: int = SIZE.steps) -> Recording:
    """Record a variant of the kit's model; the text must be in the current folder."""
    subject = build_subject(None, variant, overrides(), size=SIZE)
    return record(subject, steps=steps, keep=kept_kinds([]), replay=replay, sample_size=SAMPLE_SIZE)


def overrides() -> list[str]:
    """The model and its data, as options."""
    values = training()
    model = values["model"] | {"d_model": 32, "init_std": 0.02, "attention": {"num_heads": 2, "num_kv_heads": 1}}
    moe = model["moe"] | {"num_experts": 4, "expert_hidden": 32, "router_z_loss": 0.001}
    return [*_flat({"model": model | {"moe": moe}, "data": values["data"], "optimizer": values["optimizer"]})]


def _flat(values: dict[str, object], path: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and "name" not in value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}={_inline(value)}"


def _inline(value: object) -> str:
    """As YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_inline(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


@contextmanager
def reference() -> Iterator[dict[str, Recording]]:
    """The bundles that come with moeport, by type."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(FILE) as file:
        file.extractall(folder)
        yield {label: _of_today(load_bundle(Path(folder, label))) for label in VARIANTS}


def _of_today(recording: Recording) -> Recording:
    """The recording with the defaults of keys that configs have had since, as they are what it was made with."""
    return replace(recording, config=config_from_dict(recording.config, recorded=True).model_dump(mode="json"))


if __name__ == "__main__":
    _target = Path(sys.argv[1]).absolute()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    record_reference(_target)
    print(f"{_target}: {_target.stat().st_size:,} bytes")  # noqa: T201
