"""The tokenizer of a config, and where its tokenizer.json is: a file, a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from moeport.config.data import ByteTokenizer as ByteConfig
from moeport.config.data import DataConfig, FileTokenizer
from moeport.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from moeport.errors import DataError

FILE = "tokenizer.json"
ARGUMENT = "TOKENIZER"
"""What commands call the tokenizer that they are given."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(?<!\.json)")


def tokenizer_file(path: Path, given_as: str = "data.tokenizer.path") -> Path:
    """The tokenizer.json that a config or a command names.

    A name on the hub is looked up in the hub's cache, and downloaded only if it is not there and HF_HUB_OFFLINE is not
    set.

    Args:
        path: a file, a folder with a tokenizer.json, or a name on the hub, such as Qwen/Qwen3-30B-A3B.
        given_as: the key or argument that has it, for messages.

    Raises:
        DataError: the folder has no such file, or the hub's cache has none and it cannot be downloaded.
    """
    if path.is_dir():
        if not (path / FILE).exists():
            raise DataError(
                f"{given_as}: the folder {path} has no {FILE}; save one with "
                "`AutoTokenizer.from_pretrained(...).save_pretrained(folder)`"
            )
        return path / FILE
    if path.exists() or not _HUB_NAME.fullmatch(str(path)) or path.parent.is_dir():
        return path
    return _of_hub(str(path), given_as)


def given_tokenizer(config: DataConfig) -> Tokenizer | None:
    """The tokenizer, or None if it has to be trained.

    Raises:
        DataError: it cannot be found or used.
    """
    if isinstance(config.tokenizer, FileTokenizer):
        return load_tokenizer(tokenizer_file(config.tokenizer.path), config.tokenizer.end_of_text)
    return ByteTokenizer() if isinstance(config.tokenizer, ByteConfig) else None


def _of_hub(name: str, given_as: str) -> Path:
    import huggingface_hub
    from huggingface_hub import constants

    found = huggingface_hub.try_to_load_from_cache(name, FILE)
    if isinstance(found, str):
        return Path(found)
    here = f"{given_as}: {name!r} is not a file or folder, and the hub's cache {constants.HF_HUB_CACHE} has none"
    remedy = f"`hf download {name} {FILE}` where there is a network, and point HF_HOME there, or name a {FILE}"
    if constants.HF_HUB_OFFLINE:
        raise DataError(f"{here} of that name; HF_HUB_OFFLINE is set: run {remedy}")
    try:
        return Path(huggingface_hub.hf_hub_download(name, FILE))
    except Exception as error:  # a dozen classes of huggingface_hub, requests and httpx
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{here} of that name; it cannot be downloaded ({reason}): run {remedy}") from error
