"""What the papers leave open about training. The first value of each is the default; all of these choices are ours."""

from __future__ import annotations

from dataclasses import dataclass, fields

from moeport.errors import DataError
from moeport.errors import choices as expected

PAIR_TIES = ("smallest", "largest", "oldest", "newest", "merged", "first", "huggingface")
VALUES = {
    "pair_ties": PAIR_TIES,
    "scaffold_ties": ("scaffold", "pair", "rule"),
    "head": ("queue", "pairs"),
    "scaffold_key": ("current", "pushed"),
    "overlaps": ("adjacent", "disjoint"),
    "used_up": ("never", "readmitted"),
    "unreachable": ("warn", "error"),
}
"""The values of each choice."""


@dataclass(frozen=True)
class Choices:
    """How training decides what the algorithms do not say.

    Args:
        pair_ties: which of equally frequent pairs merges first. `smallest` and `largest`: in the order of pairs of byte
            strings; `oldest` and `newest`: by the ranks of both tokens; `merged`: the smallest merged byte string;
            `first`: the one that occurs first, in the order in which the words are given; `huggingface`: `oldest`, with
            single bytes in the order of the characters that stand for them, as trainers of the tokenizers library do.
        scaffold_ties: which is first where a scaffold that waits for readmission is as frequent as a pair. `rule`:
            `pair_ties` decides, with the pair that the scaffold was merged from.
        head: what a token must be less frequent than to become a scaffold: the next entry of the queue, be it a pair or
            a waiting scaffold, or the next pair.
        scaffold_key: how frequent a waiting scaffold counts as: as it is, or as it was when it became one.
        overlaps: how often a pair of equal tokens occurs in a run of n of them: n - 1 times, or n // 2.
        used_up: what becomes of waiting scaffolds that no longer occur once no pair is left.
        min_frequency: pairs that occur less often are never merged.
        unreachable: what happens where the words yield fewer tokens than asked for.

    Raises:
        DataError: an unknown value.
    """

    pair_ties: str = "smallest"
    scaffold_ties: str = "scaffold"
    head: str = "queue"
    scaffold_key: str = "current"
    overlaps: str = "adjacent"
    used_up: str = "never"
    min_frequency: int = 1
    unreachable: str = "warn"

    def __post_init__(self) -> None:
        """Refuses unknown values."""
        for field in fields(self):
            value = getattr(self, field.name)
            known = VALUES.get(field.name)
            if known is not None and value not in known:
                raise DataError(f"{field.name}: got {value!r}; {expected(str(value), known)}")
        if self.min_frequency < 1:
            raise DataError(f"min_frequency: got {self.min_frequency}; expected 1 or more")
