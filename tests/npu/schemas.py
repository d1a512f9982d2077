"""The schemas of the operators called, in the releases of torch_npu that are supported: schemas.txt, read and compared.

In a published wheel each schema is a string of the shared library. To compare wheels with the table:

    pip download --no-deps --dest FOLDER torch-npu==2.14.0
    python -m tests.npu.schemas FOLDER/*.whl

It imports nothing of them, and ends with status 1 where one differs.
"""

import sys
import zipfile
from pathlib import Path

import torch

TABLE = Path(__file__).with_suffix(".txt")


def pinned():
    """The schemas by release and name."""
    found, releases = {}, []
    for line in TABLE.read_text().splitlines():
        if line.startswith("# "):
            releases = line[2:].split(", ")
        elif line:
            for release in releases:
                found.setdefault(release, {})[line.partition("(")[0]] = line
    return found


def written_in(library, names):
    """The schemas of these names that the bytes of a shared library hold."""
    found = {}
    for name in names:
        place = -1
        while (place := library.find(f"\0{name}(".encode(), place + 1)) >= 0:
            found.setdefault(name, set()).add(library[place + 1 : library.index(b"\0", place + 1)].decode())
    return found


class Release:
    """Operators with the schemas of one release, to see whether they take a call."""

    def __init__(self, release, schemas):
        self.operators = torch.library.Library(f"npu_{release.replace('.', '_')}", "DEF")
        self.namespace = getattr(torch.ops, self.operators.ns)
        for schema in schemas.values():
            self.operators.impl(self.operators.define(schema).partition(".")[0], taken, "Meta")

    def take(self, name, args, kwargs):
        """Raises what PyTorch raises where the schema does not take these arguments."""
        args, kwargs = torch.utils._pytree.tree_map(_meta, (args, kwargs))
        try:
            getattr(self.namespace, name)(*args, **kwargs)
        except Taken:
            return
        raise AssertionError(f"{name} has not run")


class Taken(Exception):
    """The arguments fit."""


def taken(*args, **kwargs):
    raise Taken


def _meta(x):
    """Of the same shape, type and strides; the tensor may be one without values."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") if isinstance(x, torch.Tensor) else x


def main(*wheels):
    wrong = 0
    for wheel in wheels:
        release = Path(wheel).name.split("-")[1]
        wanted, found = pinned()[release], {}
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".so"):
                    found |= written_in(archive.read(name), wanted)
        different = [name for name, schema in wanted.items() if found.get(name) != {schema}]
        print(f"{release}: {len(wanted)} schemas", *(f"differs: {found.get(name)}" for name in different), sep="\n  ")
        wrong += len(different)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
