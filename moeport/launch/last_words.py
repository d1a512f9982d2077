"""The last sentence of a rank, left where its launcher finds it.

A launcher prints its own report after its ranks have ended, and buries what they said. torchrun shows what a rank
wrote to the file that TORCHELASTIC_ERROR_FILE names, and `moeport launch --run` repeats what is in a folder of its own.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from moeport.errors import UserError

FOLDER = "MOEPORT_LAST_WORDS"
"""Environment variable: the folder that `moeport launch --run` reads."""
TORCHRUN_FILE = "TORCHELASTIC_ERROR_FILE"


@dataclass(frozen=True)
class LastWords:
    """Why a rank has ended."""

    text: str
    code: int
    """Its exit code."""


def leave(text: str, code: int) -> None:
    """Leave a sentence for the launcher, if there is one; the first of a process counts.

    msrun's scheduler fails because ranks have ended, so what it says comes before what they say, and only if the user
    can mend it.
    """
    now = time.time()
    scheduler = os.environ.get("MS_ROLE") == "MS_SCHED"
    if (folder := os.environ.get(FOLDER)) and not (scheduler and code != UserError.exit_code):
        order = 0.0 if scheduler else now
        _write(Path(folder, f"{order:017.6f}-{os.getpid()}.json"), {"text": text, "code": code})
    if file := os.environ.get(TORCHRUN_FILE):
        _write(Path(file), {"message": text, "timestamp": int(now)})


def read(folder: Path) -> list[LastWords]:
    """What ranks have left, the first first, each sentence once; before it, what msrun's scheduler has left."""
    found: dict[str, LastWords] = {}
    for file in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(file.read_text())
            words = LastWords(str(content["text"]), int(content["code"]))
            found.setdefault(words.text, words)
    return list(found.values())


def _write(file: Path, content: dict[str, object]) -> None:
    """Best effort: a rank ends for a better reason than a full disk."""
    with suppress(OSError), file.open("x") as opened:
        json.dump(content, opened)
