"""Which files the globs and folders of a config name."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

from moeport.data.left_out import LeftOut
from moeport.errors import DataError

MAX_NAMED = 5
"""Files that an error about their kind names; it counts the others."""


def find_files(
    patterns: Sequence[str],
    exclude: Sequence[str],
    is_readable: Callable[[str], bool],
    kinds: str,
    option: str,
    left_out: LeftOut,
) -> list[str]:
    """The files that match the globs or are in the folders, sorted by name; each file once, under its first name.

    Args:
        patterns: files, folders, or globs, in which `**` matches any number of folders.
        exclude: globs of files and folders to leave out.
        is_readable: whether there is a reader for a path.
        kinds: the kinds of files that can be read, for error messages.
        option: the config key that holds the patterns, for error messages.
        left_out: what is passed over is added to it.

    Raises:
        DataError: a pattern names no file, or one that there is no reader for.
    """
    excluded = [_Excluded(pattern) for pattern in exclude]
    found: set[str] = set()
    for pattern in patterns:
        paths = {path for path in _named(pattern, is_readable, left_out) if not any(each(path) for each in excluded)}
        if not paths:
            raise DataError(_nothing(pattern, option, kinds, excluded))
        found |= paths
    unknown = [path for path in sorted(found) if not is_readable(path)]
    if unknown:
        others = f" and {len(unknown) - MAX_NAMED:,} more" if len(unknown) > MAX_NAMED else ""
        raise DataError(
            f"{option}: cannot read {', '.join(unknown[:MAX_NAMED])}{others}: expected {kinds}; narrow the glob, such "
            "as data/**/*.txt, name the suffix in data.source.text_suffixes, or convert the file"
        )
    left_out.notes += [f"data.source.exclude: {each.pattern!r} matches no file" for each in excluded if not each.used]
    return _once(sorted(found), left_out)


def file_key(path: str) -> tuple[int, int] | str:
    """What is equal for two names of one file: hard links and symbolic links; the path where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return os.path.abspath(path)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _nothing(pattern: str, option: str, kinds: str, excluded: Sequence[_Excluded]) -> str:
    left = " that data.source.exclude leaves" if excluded else ""
    if os.path.isdir(pattern):
        return f"{option}: the folder {pattern!r} has no file{left} to read; expected {kinds}"
    return f"{option}: no file{left} matches {pattern!r} (working directory {os.getcwd()})"


def _named(pattern: str, is_readable: Callable[[str], bool], left_out: LeftOut) -> Iterator[str]:
    """The files that one pattern names; those that there is no reader for only if a glob names them."""
    if os.path.isdir(pattern):
        passed_over: Counter[str] = Counter()
        for path in _walk(pattern, ("**",), passed_over):
            if is_readable(path):
                yield path
            else:
                suffix = os.path.splitext(path)[1]
                passed_over[f"with {suffix}" if suffix else "without a suffix"] += 1
        left_out.add_folder(pattern, passed_over)
    elif os.path.lexists(pattern):
        yield os.path.normpath(pattern)
    else:
        yield from _glob(pattern)


def _glob(pattern: str) -> Iterator[str]:
    """As `glob.glob`, but links to folders are followed only once, so that it comes to an end in a circle of links."""
    parts = pattern.split("/")
    if "**" not in parts:
        matches: Iterable[str] = glob.glob(pattern)
        yield from (os.path.normpath(path) for path in matches if not os.path.isdir(path))
        return
    first = parts.index("**")
    head = "/".join(parts[:first])
    roots = glob.glob(head) if head else ["/" if first else "."]
    for root in roots:
        if os.path.isdir(root):
            yield from _walk(root, tuple(parts[first:]))


def _walk(root: str, pattern: tuple[str, ...], passed_over: Counter[str] | None = None) -> Iterator[str]:
    """The files below a folder whose path within it matches; each folder is visited once, whatever leads to it.

    Args:
        root: the folder.
        pattern: the parts of a glob.
        passed_over: counts hidden entries and broken links, and leaves them out; None: broken links match too.
    """
    seen = {file_key(root)}
    folders = [(root, _closed({0}, pattern))]
    while folders:
        folder, states = folders.pop()
        below = []
        try:
            names = sorted(os.listdir(folder))
        except OSError as error:
            if passed_over is not None:
                passed_over[f"that cannot be listed ({error.strerror})"] += 1
            continue
        for name in names:
            path = os.path.join(folder, name)
            after = _after(states, name, pattern)
            if passed_over is not None and (name.startswith(".") or not os.path.exists(path)):
                passed_over["hidden" if name.startswith(".") else "with a broken link"] += 1
            elif os.path.isdir(path):
                if after and file_key(path) not in seen:
                    seen.add(file_key(path))
                    below.append((path, after))
            elif len(pattern) in after or (pattern[-1] == "**" and len(pattern) - 1 in after):
                yield os.path.normpath(path)
        folders += reversed(below)


def _closed(states: set[int], pattern: tuple[str, ...]) -> set[int]:
    """The positions in a pattern that can be reached without a further part of the path: `**` matches none too."""
    for state in sorted(states):
        while state < len(pattern) and pattern[state] == "**":
            state += 1
            states.add(state)
    return states


def _after(states: set[int], name: str, pattern: tuple[str, ...], hidden: bool = False) -> set[int]:
    """The positions after one more part of the path; as in a shell, only `.*` matches hidden names."""
    after = set()
    for state in states:
        if state == len(pattern):
            continue
        shown = hidden or not name.startswith(".") or pattern[state].startswith(".")
        if pattern[state] == "**":
            after |= {state} if shown else set()
        elif shown and fnmatchcase(name, pattern[state]):
            after.add(state + 1)
    return _closed(after, pattern)


class _Excluded:
    """Whether a glob leaves a path out: it matches the path, a folder above it or, without a slash, any part of it."""

    def __init__(self, pattern: str):
        self.pattern, self.used = pattern, False
        parts = os.path.normpath(pattern).split("/")
        self._parts = tuple(parts) if "/" in pattern.rstrip("/") else ("**", *parts)

    def __call__(self, path: str) -> bool:
        absolute = os.path.abspath(path)
        named = [path, absolute] if os.path.isabs(self.pattern) else [path, os.path.relpath(absolute)]
        found = any(self._matches(each.split("/")) for each in named)
        self.used |= found
        return found

    def _matches(self, path: Sequence[str]) -> bool:
        states = _closed({0}, self._parts)
        for name in path:
            states = _after(states, name, self._parts, hidden=True)
            if len(self._parts) in states:
                return True
        return False


def _once(paths: Sequence[str], left_out: LeftOut) -> list[str]:
    first: dict[tuple[int, int] | str, str] = {}
    for path in paths:
        first.setdefault(file_key(path), path)
    left_out.other_names += len(paths) - len(first)
    return list(first.values())
