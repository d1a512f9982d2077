"""Texts that a command reads as data.source reads them."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import typer

Progress = Callable[[str, int, int], None]
"""As `FileProgress.add`."""

TextFiles = Annotated[
    list[str],
    typer.Option(
        "--text",
        metavar="FILES",
        help="File, folder or glob of texts, as data.source.paths. Repeatable. Default: the source that --set names, "
        "or Python's standard library.",
        show_default=False,
    ),
]
SourceOverrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="How texts are read, as in --set data.source.bad_files=skip. Repeatable.",
    ),
]


READ = ("data.source.", "data.source=", "data.cache_dir=")
"""How an override begins that decides something here."""


class Texts:
    """The documents of a source; its files are looked up at once.

    Args:
        paths: files, folders or globs; empty: the source that the overrides name.
        overrides: `data.source.KEY=VALUE`.

    Raises:
        ConfigError: a key or value of the overrides is wrong.
        UserError: an override is of something else.
        DataError: files are missing.
    """

    def __init__(self, paths: Sequence[str], overrides: Sequence[str] | None):
        from moeport.config import load_config
        from moeport.data.left_out import LeftOut
        from moeport.data.sources import open_source
        from moeport.data.streams import UNPACKERS
        from moeport.errors import UserError

        for text in overrides or ():
            if not text.startswith(READ):
                raise UserError(f"--set {text}: expected data.source.KEY=VALUE; nothing else says how texts are read")
        named = ["data.source.name=files", f"data.source.paths={json.dumps(list(paths))}"] if paths else []
        self._left_out = LeftOut()
        self._source = open_source(load_config(None, [*named, *(overrides or ())]).data, self._left_out)
        files = self._source.stamp() or []
        packed = {*UNPACKERS, ".parquet"}
        is_plain = not any(os.path.splitext(name)[1].lower() in packed for name, *_ in files)
        self._total = sum(size for _, size, *_ in files) if is_plain else 0

    def read(self, progress: Progress) -> Iterator[tuple[str, str]]:
        """The name and text of each document, read from its file as it is asked for.

        Args:
            progress: is told how much was read.

        Raises:
            DataError: what cannot be read, after everything else was, unless data.source.bad_files is skip; or there is
                no text at all.
        """
        from moeport.errors import DataError

        done = 0
        for document in self._source.train(self._left_out):
            if document.text:
                yield document.name, document.text
                done += document.num_bytes
                progress(document.name, done, max(self._total, done) if self._total else 0)
        self._source.refuse_faults(self._left_out)
        if not done:
            raise DataError("--text: there is no text in these files; expected at least one that is not empty")

    def lines(self) -> list[str]:
        """What was left out, to be printed after reading."""
        return self._left_out.lines()
