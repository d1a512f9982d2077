"""The printable characters that stand for bytes in byte-level vocabularies on disk, as GPT-2 chose them."""

from __future__ import annotations

from itertools import count


def byte_characters() -> list[str]:
    """The character of each byte: itself where it is printable, else one of the first unused ones from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = count(256)
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTES = {ord(character): byte for byte, character in enumerate(byte_characters())}
_CHARACTERS = dict(enumerate(byte_characters()))


def to_characters(token: bytes) -> str:
    """A token as a byte-level vocabulary writes it."""
    return token.decode("latin-1").translate(_CHARACTERS)


def from_characters(text: str) -> bytes:
    """The bytes of a token that a byte-level vocabulary wrote.

    Raises:
        ValueError: a character stands for no byte.
    """
    try:
        return bytes([_BYTES[ord(character)] for character in text])
    except KeyError:
        raise ValueError(f"{text!r} has characters that stand for no byte in a byte-level vocabulary") from None
