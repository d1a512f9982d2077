"""The data section: where text comes from and how it becomes token sequences."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from moeport.config.base import Section


class StdlibSource(Section):
    """The Python standard library's own sources: real text that is always there."""

    name: Literal["stdlib"] = "stdlib"
    """`stdlib`"""


class FilesSource(Section):
    """Local files: .txt and .py (one document each), .jsonl and .parquet (one document a row)."""

    name: Literal["files"] = "files"
    """`files`"""
    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Globs of training files (`**` crosses folders), relative to the working directory."""
    validation_paths: tuple[str, ...] = ()
    """Globs of validation files. Default: a share of the documents, see data.validation_fraction."""
    text_field: str = "text"
    """Column that holds the text in .jsonl and .parquet files."""


class HuggingFaceSource(Section):
    """A dataset of the Hugging Face hub."""

    name: Literal["huggingface"] = "huggingface"
    """`huggingface`"""
    dataset: str
    """Dataset name on the hub, or a local folder that `datasets` can load."""
    subset: str | None = None
    """Dataset configuration name."""
    split: str = "train"
    """Training split."""
    validation_split: str | None = None
    """Validation split. Default: a share of the documents, see data.validation_fraction."""
    text_field: str = "text"
    """Column that holds the text."""


class ByteTokenizer(Section):
    """One token a UTF-8 byte: 256 bytes and the end of text."""

    name: Literal["byte"] = "byte"
    """`byte`"""


class BPETokenizer(Section):
    """Byte-level BPE, trained on the training documents and cached."""

    name: Literal["bpe"] = "bpe"
    """`bpe`"""
    vocab_size: Annotated[int, Field(ge=257)] = 4096
    """Tokens, the 256 bytes and the end of text included."""


class FileTokenizer(Section):
    """A given tokenizer.json of Hugging Face tokenizers."""

    name: Literal["file"] = "file"
    """`file`"""
    path: Path
    """The tokenizer.json."""
    end_of_text: str = "<|endoftext|>"
    """The token that ends a document; must be in the vocabulary."""


class DataConfig(Section):
    """Documents, tokenizer and packing."""

    source: Annotated[StdlibSource | FilesSource | HuggingFaceSource, Field(discriminator="name")] = StdlibSource()
    """Where documents come from."""
    tokenizer: Annotated[ByteTokenizer | BPETokenizer | FileTokenizer, Field(discriminator="name")] = BPETokenizer()
    """How text becomes tokens."""
    sequence_length: PositiveInt = 512
    """Tokens a sequence S."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the documents held out, chosen by a hash of the document's name."""
    cache_dir: Path | None = None
    """Where tokenizers and token files are kept. Default: $XDG_CACHE_HOME/moeport or ~/.cache/moeport."""
