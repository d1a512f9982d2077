"""Normalization of texts before they are cut, as tokenizers that were trained elsewhere ask for it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from tokenizers import normalizers

from moeport.tokenizers.streaming import as_text

NORMALIZERS = ("NFC",)
"""Canonical composition of Unicode, which Qwen's tokenizers apply."""

_SURROGATES = re.compile("([\ud800-\udfff]+)")


def normalizing(name: str | None) -> Callable[[bytes], bytes]:
    """The function that normalizes the bytes of a text; bytes that are not UTF-8 stay as they are.

    The tokenizers library composes by an older version of Unicode than Python, so it has the last word.

    Args:
        name: one of `NORMALIZERS`; None: texts stay as they are.
    """
    if name is None:
        return lambda data: data
    library = normalizers.NFC()

    def normalized(data: bytes) -> bytes:
        if data.isascii():
            return data
        text = as_text(data)
        if unicodedata.is_normalized("NFC", text):
            return data
        parts = _SURROGATES.split(text)  # which the library does not take
        parts[::2] = map(library.normalize_str, parts[::2])
        return "".join(parts).encode("utf-8", "surrogateescape")

    return normalized
