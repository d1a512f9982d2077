"""Names of models from elsewhere, seen through wrappers and prefixes: `_orig_mod.first` and `model.first` are `first`.

torch.compile, DistributedDataParallel, FSDP and checkpoint wrappers add a segment to the names of what they wrap, and
often a module of their own around it; a model inside another has a prefix.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from moeport.parity.coverage import KINDS
from moeport.parity.recording import Recording, TensorRecord

WRAPPERS = (
    *("_orig_mod", "module", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"),
    *("_forward_module", "_original_module", "_wrapped_module"),
)
"""Segments that wrappers add: torch.compile, DDP and DataParallel, FSDP, checkpoint wrappers, Fabric, DeepSpeed."""
ROOT = "model"
"""The path of a whole model, whose own name is empty."""
TAIL = re.compile(r"(\w+)(.*)", re.DOTALL)
"""Class of a module, and the rest: which of its tensors, of which call."""
DEPTH = 4
"""Maximum number of segments of a prefix."""

Path = tuple[str, ...]


@dataclass(frozen=True)
class _Name:
    """A name, taken apart."""

    head: str
    """Such as `gradient:`; empty for outputs."""
    path: Path
    """Of the module or parameter."""
    kind: str
    """Class of the module; empty for parameters."""
    rest: str

    @property
    def place(self) -> tuple[str, Path, str]:
        """Everything but the class."""
        return self.head, self.path, self.rest

    def __str__(self) -> str:
        path = ".".join(self.path) or ROOT
        return f"{self.head}{path}" + (f":{self.kind}{self.rest}" if self.kind else "")


def aligned(a: Recording, b: Recording) -> tuple[Recording, Recording]:
    """Both recordings with the names that they share once wrappers and prefixes are left out.

    Recordings of configs stay as they are. What was left out is noted.
    """
    if "model" in a.config and "model" in b.config:
        return a, b
    a, b = (_unwrapped(side) for side in (a, b))
    a, b = _without_prefixes(a, b)
    return a, _with_classes_of(a, b)


def _parse(name: str, tensor: TensorRecord) -> _Name | None:
    """A name taken apart; None for what belongs to no module."""
    if tensor.kind == "input" or name.startswith("user:"):
        return None
    computed = tensor.kind in (*KINDS["forward"], *KINDS["routing"])
    head, rest = ("", name) if computed else (f"{name.partition(':')[0]}:", name.partition(":")[2])
    path, _, tail = rest.partition(":")
    found = TAIL.fullmatch(tail)
    segments = tuple(path.split("."))
    return _Name(head, () if segments == (ROOT,) else segments, *(found.groups() if found else ("", "")))


def _parsed(side: Recording) -> dict[str, _Name]:
    return {name: parsed for name, t in side.tensors.items() if (parsed := _parse(name, t))}


def _unwrapped(side: Recording) -> Recording:
    """Names without the segments of wrappers. Of a wrapper's output and that of what it wraps, the latter stays."""
    names = _parsed(side)
    inner = {name: replace(p, path=tuple(s for s in p.path if s not in WRAPPERS)) for name, p in names.items()}
    if inner == names:
        return side
    deepest: dict[tuple[str, Path, str], str] = {}
    for name, parsed in inner.items():
        known = deepest.get(parsed.place)
        if known is None or len(names[name].path) > len(names[known].path):
            deepest[parsed.place] = name
    wrapped = [name for name, p in inner.items() if deepest[p.place] != name and p.kind]
    seen = sorted({s for name in names for s in names[name].path if s in WRAPPERS})
    wrapped += [name for name, p in inner.items() if _is_root_input(p, ()) and name not in wrapped]
    kept = {name: t for name, t in side.tensors.items() if name not in wrapped}
    renamed = {name: str(inner[name]) for name in kept if name in inner and deepest[inner[name].place] == name}
    through = {name: str(inner[name]) for name in wrapped}
    note = f"names are read without {', '.join(seen)}"
    return _renamed(replace(side, tensors=kept, notes=[*side.notes, note]), {**through, **renamed})


def _without_prefixes(a: Recording, b: Recording) -> tuple[Recording, Recording]:
    """Names without the prefix, on either side, that makes the most parameters agree in name and shape."""
    names_a, names_b = _parsed(a), _parsed(b)
    own = {side.name: {p.path: side.tensors[n].shape for n, p in names.items() if p.head == "parameter:"}
           for side, names in ((a, names_a), (b, names_b))}  # fmt: skip
    mine, its = (_prefixes(own[side.name]) for side in (a, b))

    def matches(pair: tuple[Path, Path]) -> int:
        shapes = [_stripped(own[side.name], prefix) for side, prefix in zip((a, b), pair, strict=True)]
        return sum(shapes[1].get(path) == shape for path, shape in shapes[0].items())

    best = max(((p, q) for p in mine for q in its), key=lambda pair: (matches(pair), -len(pair[0]) - len(pair[1])))
    if best == ((), ()):
        return a, b
    sides = []
    for side, names, prefix in ((a, names_a, best[0]), (b, names_b, best[1])):
        changed = {n: str(replace(p, path=p.path[len(prefix) :])) for n, p in names.items() if _starts(p.path, prefix)}
        if not prefix:
            sides.append(side)
            continue
        note = f"names are read without the prefix {'.'.join(prefix)}."
        kept = {n: t for n, t in side.tensors.items() if not _passed_on(side, names, n, prefix)}
        taken = Counter(changed.get(name, name) for name in kept)
        unique = {name: changed[name] for name in kept if name in changed and taken[changed[name]] == 1}
        sides.append(_renamed(replace(side, tensors=kept, notes=[*side.notes, note]), unique))
    return sides[0], sides[1]


def _passed_on(side: Recording, names: Mapping[str, _Name], name: str, prefix: Path) -> bool:
    """Whether a module around the prefix returns, as this tensor, what the module at the prefix returned."""
    outer = names.get(name)
    if outer and _is_root_input(outer, prefix):
        return True
    if outer is None or not outer.kind or outer.path == prefix or not _starts(prefix, outer.path):
        return False
    rest = outer.rest.partition("#")[0]
    within = [(n, p) for n, p in names.items() if p.kind and p.rest == rest and p.path in (prefix, ())]
    first = next((p.kind for _, p in within if not p.head), outer.kind)  # inner modules return first
    same = [n for n, p in within if p.head == outer.head and n != name and (p.path == prefix or p.kind == first)]
    is_inner = outer.kind == first and outer.rest == rest and not any(p.path == prefix for _, p in within)
    return not is_inner and any(_equal(side.tensors[name], side.tensors[n]) for n in same)


def _is_root_input(name: _Name, root: Path) -> bool:
    """Whether it is what wrappers give to the model inside them, which is recorded as the input already."""
    return not name.head and name.path == root and name.rest.startswith(".x")


def _equal(x: TensorRecord, y: TensorRecord) -> bool:
    if x.values is None or y.values is None:
        return x.statistics == y.statistics and x.shape == y.shape
    return np.array_equal(x.values, y.values, equal_nan=x.is_float)


def _prefixes(paths: Iterable[Path]) -> list[Path]:
    """No prefix, and those of at least half of the parameters."""
    known = list(paths)
    count = Counter(path[:n] for path in known for n in range(1, min(DEPTH, len(path) - 1) + 1))
    return [(), *(prefix for prefix, times in count.items() if 2 * times >= len(known))]


def _starts(path: Path, prefix: Path) -> bool:
    return path[: len(prefix)] == prefix


def _stripped(shapes: Mapping[Path, tuple[int, ...]], prefix: Path) -> dict[Path, tuple[int, ...]]:
    return {path[len(prefix) :] if _starts(path, prefix) else path: shape for path, shape in shapes.items()}


def _with_classes_of(a: Recording, b: Recording) -> Recording:
    """B with A's classes, where one module of each side has outputs at the same place that the other lacks."""
    places_a = _places(a, lambda name: name not in b.tensors)
    places_b = _places(b, lambda name: name not in a.tensors)
    renamed = {
        names[0]: places_a[place][0]
        for place, names in places_b.items()
        if len(names) == 1 and len(places_a.get(place, ())) == 1
    }
    return _renamed(b, renamed)


def _places(side: Recording, wanted: Callable[[str], bool]) -> dict[tuple[str, Path, str], list[str]]:
    places: dict[tuple[str, Path, str], list[str]] = {}
    for name, parsed in _parsed(side).items():
        if wanted(name) and parsed.kind:
            places.setdefault(parsed.place, []).append(name)
    return places


def _renamed(side: Recording, names: Mapping[str, str]) -> Recording:
    """A recording with other names, also of inputs."""
    if not names:
        return side
    tensors = {}
    for name, tensor in side.tensors.items():
        new = names.get(name, name)
        inputs = tuple(names.get(given, given) for given in tensor.inputs)
        tensors[new] = replace(tensor, name=new, inputs=inputs)
    return replace(side, tensors=tensors)
