"""A file of another framework to a config, with a verdict on every key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moeport.config import config_from_dict
from moeport.convert.translate import hf, megatron, mindformers, torchtitan
from moeport.convert.translate.draft import Draft, Entry, Rule, State, Typed
from moeport.errors import ConfigError, UserError, choices


@dataclass(frozen=True)
class Framework:
    """How the files of a framework are read."""

    files: str
    """What they are, for messages."""
    read: Callable[[Path], dict[str, Any]]
    typed: Typed
    combine: Callable[[Draft], None]
    rules: Mapping[str, Rule]
    prefixes: Mapping[str, str]


FRAMEWORKS = {
    name: Framework(files, module.read_file, module.TYPED, module.combine, module.RULES, module.PREFIXES)
    for name, files, module in (
        ("megatron", "a shell script or YAML with the options of Megatron-LM", megatron),
        ("mindformers", "a YAML file of MindFormers", mindformers),
        ("torchtitan", "a TOML job config of torchtitan", torchtitan),
        ("hf", "config.json of transformers, or its folder", hf),
    )
}
STATES: tuple[State, ...] = ("not expressible", "unknown", "ignored", "understood")


@dataclass(frozen=True)
class Translation:
    """What a file becomes."""

    sections: Mapping[str, Any]
    """The config, of what could be expressed; checked."""
    entries: Sequence[Entry]
    """A verdict on every key of the file, and on defaults of the framework that differ."""

    def of(self, state: State) -> list[Entry]:
        """The entries in one state."""
        return [entry for entry in self.entries if entry.state == state]

    def as_yaml(self, source: str) -> str:
        """The config as YAML, with what is missing in it as comments."""
        lines = [f"# Translated from {_line(source)}. Set data.source and data.tokenizer to what it should train on."]
        for entry in (*self.of("not expressible"), *self.of("unknown")):
            lines.append(f"# {entry.state}: {_verdict(entry, ': ')}")
        return "\n".join(lines) + "\n" + yaml.safe_dump(dict(self.sections), sort_keys=False)

    def as_lines(self) -> list[str]:
        """The verdicts, what is missing first."""
        lines = []
        for state in STATES:
            entries = self.of(state)
            lines.append(f"{state}: {len(entries)}")
            for entry in entries:
                lines.append(f"  {_verdict(entry, ' -> ' if state == 'understood' else ': ')}")
        return lines


def translate(framework: str, path: Path, ranks: int | None = None, allow_missing: bool = False) -> Translation:
    """Translate a file.

    Args:
        framework: a name in FRAMEWORKS.
        path: the file.
        ranks: how many data-parallel ranks the file is for, where it gives the batch of one.
        allow_missing: accept keys that cannot be expressed; they are then missing in the config.

    Raises:
        UserError: the framework is unknown, the file cannot be read, or a key cannot be expressed.
        ConfigError: what it says makes no valid config.
    """
    if framework not in FRAMEWORKS:
        raise UserError(f"{framework}: not a framework that can be translated; {choices(framework, FRAMEWORKS)}")
    known = FRAMEWORKS[framework]
    values = known.read(path)
    if not values:
        raise UserError(f"{path}: no keys found; expected {known.files}")
    draft = Draft(values, ranks)
    for convert, keys in known.typed.items():
        draft.require(convert, *keys)
    known.combine(draft)
    draft.apply(known.rules, known.prefixes)
    if all(entry.state == "unknown" for entry in draft.entries if entry.given):
        raise UserError(f"{path}: moeport knows none of its {len(values)} keys; expected {known.files}")
    order = {key: number for number, key in enumerate(values)}
    entries = sorted(draft.entries, key=lambda entry: order.get(entry.key, len(order)))
    missing = [entry for entry in entries if entry.state == "not expressible"]
    if missing and not allow_missing:
        listed = "".join(f"\n  {_verdict(entry, ': ')}" for entry in missing)
        raise UserError(
            f"{path}: {len(missing)} {'key' if len(missing) == 1 else 'keys'} cannot be expressed and would change "
            f"what is trained:{listed}\nWith --allow-missing the others are translated without them"
        )
    _tokenizer(draft)
    try:
        config_from_dict(draft.sections)
    except ConfigError as error:
        raise ConfigError(f"{path}: it does not translate to a valid config of moeport:\n{error}") from error
    return Translation(draft.sections, entries)


def _tokenizer(draft: Draft) -> None:
    """A tokenizer as large as the vocabulary, since the file's own cannot be read; the user replaces it."""
    size = draft.sections.get("model", {}).get("vocab_size")
    if isinstance(size, int):
        draft.put("data.tokenizer", {"name": "bpe", "vocab_size": size} if size > 257 else {"name": "byte"})


def _verdict(entry: Entry, joint: str) -> str:
    """An entry in one line."""
    value = _line(str(entry.value).lower() if isinstance(entry.value, bool) else str(entry.value))
    short = value if len(value) <= 60 else f"{value[:57]}..."
    given = "" if entry.given else " (not given, the default)"
    return f"{_line(entry.key)} = {short}{given}{joint}{_line(entry.note)}"


def _line(text: str) -> str:
    """What a file says, without anything that would end a comment or move the cursor."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
