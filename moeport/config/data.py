"""The data section: where text or images come from, and how they become sequences of tokens."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from moeport.config.objective import Denoiser, ObjectiveConfig
from moeport.config.path_types import UserPath, UserPattern
from moeport.core.section import Section

DIGITS_SIDE, DIGITS_CLASSES = 8, 10
SEQUENCES_PER_CYCLE = 4096
"""In every run of this many sequences, a mixture takes a fixed number from each source."""
TEXT_SOURCES = ("stdlib", "files", "huggingface")


class StdlibSource(Section):
    """The source files of Python's standard library: real text that is always available."""

    name: Literal["stdlib"] = "stdlib"
    """`stdlib`"""


class FilesSource(Section):
    """Local files: text (.txt, .py, .md, .rst, .html; one document each), .jsonl and .parquet (one document per row).

    Text and .jsonl may be compressed: .gz, .zst, .bz2, .xz.
    """

    name: Literal["files"] = "files"
    """`files`"""
    paths: Annotated[tuple[UserPattern, ...], Field(min_length=1)]
    """Globs of training files, relative to data.root; `**` matches any number of folders. A folder stands
    for all files in it and below."""
    validation_paths: tuple[UserPattern, ...] = ()
    """Globs of validation files, or folders. Default: a share of the documents; see data.validation_fraction."""
    exclude: tuple[UserPattern, ...] = ()
    """Globs of files and folders to leave out; one without a slash is compared with every part of a path."""
    text_suffixes: tuple[str, ...] = ()
    """More suffixes of text files, such as .tex; `*` stands for any other suffix or none."""
    encoding: str = "utf-8"
    """Encoding of text and .jsonl files. Byte order marks of UTF-8, UTF-16 and UTF-32 take precedence over utf-8."""
    bad_files: Literal["refuse", "skip"] = "refuse"
    """What to do with files and rows that cannot be read: refuse them all with a list, or skip and count them."""
    text_field: str = "text"
    """Column that holds the text in .jsonl and .parquet files."""


class HuggingFaceSource(Section):
    """A dataset from the Hugging Face hub."""

    name: Literal["huggingface"] = "huggingface"
    """`huggingface`"""
    dataset: UserPattern
    """Dataset name on the hub, or a local folder that `datasets` can load."""
    subset: str | None = None
    """Dataset configuration name."""
    revision: str | None = None
    """Branch, tag or commit of the dataset on the hub. Default: its main branch."""
    split: str = "train"
    """Training split."""
    streaming: bool = False
    """Read rows as they arrive from the hub, and keep only their texts, compressed, in data.cache_dir, instead of
    downloading and converting all files of the dataset."""
    validation_split: str | None = None
    """Validation split. Default: a share of the documents; see data.validation_fraction."""
    text_field: str = "text"
    """Column that holds the text."""


TextSource = Annotated[StdlibSource | FilesSource | HuggingFaceSource, Field(discriminator="name")]


class MixedSource(Section):
    """A source of a mixture."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """What it is called in messages and summaries."""
    weight: PositiveFloat = 1.0
    """Its share of the sequences, as a part of the sum of all weights."""
    source: TextSource
    """Where its documents come from, as in data.source."""


class Domain(Section):
    """Text of one kind, which some nodes train on."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """What it is called in messages, metrics and summaries."""
    source: TextSource = StdlibSource()
    """Where its documents come from, as in data.source; must be given."""
    sources: tuple[MixedSource, ...] = ()
    """Several sources, mixed by weight, in place of its source, as in data.sources."""

    @property
    def streams(self) -> tuple[MixedSource, ...]:
        """Its sources: one by the name of the domain, those of a mixture as `DOMAIN/SOURCE`."""
        if not self.sources:
            return (MixedSource.model_construct(name=self.name, source=self.source),)
        return tuple(each.model_copy(update={"name": f"{self.name}/{each.name}"}) for each in self.sources)

    @property
    def has_one_origin(self) -> bool:
        """Whether either its source or its sources are given; the whole dump of a config has both."""
        return self.source == StdlibSource() if self.sources else "source" in self.model_fields_set


class DigitsSource(Section):
    """The handwritten digits of scikit-learn: 1,797 images of 8 x 8 pixels in 10 classes. The model becomes an image
    classifier.
    """

    name: Literal["digits"] = "digits"
    """`digits`"""
    patch_size: PositiveInt = 2
    """Side of a patch in pixels; must divide 8. Each patch is a token."""

    @property
    def num_patches(self) -> int:
        """Patches per image, S."""
        return (DIGITS_SIDE // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """Pixels per patch, P."""
        return self.patch_size**2


class ByteTokenizer(Section):
    """One token per UTF-8 byte: 256 bytes and the end of text."""

    name: Literal["byte"] = "byte"
    """`byte`"""


class BPETokenizer(Section):
    """Byte-level BPE, trained on the training documents and cached."""

    name: Literal["bpe"] = "bpe"
    """`bpe`"""
    vocab_size: Annotated[int, Field(ge=257)] = 4096
    """Number of tokens, including the 256 bytes and the end of text."""


class ScaffoldBPETokenizer(Section):
    """Byte-level Scaffold-BPE, trained on the training documents and cached."""

    name: Literal["scaffold_bpe"] = "scaffold_bpe"
    """`scaffold_bpe`"""
    vocab_size: Annotated[int, Field(ge=257)] = 4096
    """Number of tokens, including the 256 bytes and the end of text; scaffold tokens are not among them."""
    pattern: str = "moeport"
    """The pieces that no token crosses: a named pattern (moeport, gpt2, gpt4, digits) or a regular expression."""


class LBPETokenizer(Section):
    """Byte-level LBPE, trained on the training documents and cached: the longest token of the vocabulary first."""

    name: Literal["lbpe"] = "lbpe"
    """`lbpe`"""
    vocab_size: Annotated[int, Field(ge=257)] = 4096
    """Number of tokens, including the 256 bytes and the end of text."""
    base: Literal["bpe", "scaffold_bpe"] = "bpe"
    """How the vocabulary is trained."""
    pattern: str = "moeport"
    """The pieces that no token crosses: a named pattern (moeport, gpt2, gpt4, digits) or a regular expression."""


class FileTokenizer(Section):
    """An existing tokenizer.json of moeport or of Hugging Face tokenizers."""

    name: Literal["file"] = "file"
    """`file`"""
    path: UserPath
    """A tokenizer.json, a folder that has one, or a name on the Hugging Face hub, such as Qwen/Qwen3-30B-A3B, that is
    in the hub's cache or can be downloaded."""
    end_of_text: str = "<|endoftext|>"
    """The token that ends a document; must be in the vocabulary."""


class DataConfig(Section):
    """Documents, tokenizer and packing, or images."""

    source: Annotated[StdlibSource | FilesSource | HuggingFaceSource | DigitsSource, Field(discriminator="name")] = (
        StdlibSource()
    )
    """Where documents or images come from."""
    sources: tuple[MixedSource, ...] = ()
    """Several sources of text, mixed by weight, in place of data.source: a list of mappings with a `name`, a `weight`
    (1.0 by default) and a `source`, which has the keys of data.source."""
    domains: tuple[Domain, ...] = ()
    """Text that differs from node to node, in place of data.source: a list of mappings with a `name` and a `source`,
    which has the keys of data.source, or `sources`. Node n trains on domain n modulo the number of domains."""
    tokenizer: Annotated[
        ByteTokenizer | BPETokenizer | ScaffoldBPETokenizer | LBPETokenizer | FileTokenizer, Field(discriminator="name")
    ] = BPETokenizer()
    """How text becomes tokens."""
    sequence_length: PositiveInt = 512
    """Tokens per sequence, S."""
    document_mask: bool = False
    """Attention stays within documents: a token sees no other document of its sequence, and positions count from the
    beginning of its document, at an end of text."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is predicted of a text."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the data held out, chosen by a hash of each document's name or each image's index."""
    root: UserPath | None = None
    """Folder that the relative paths of sources start from. It is not part of a document's name, so the same text may
    lie elsewhere on another machine. Default: the working directory."""
    cache_dir: UserPath | None = None
    """Folder of cached tokenizers and token files. Default: $XDG_CACHE_HOME/moeport or ~/.cache/moeport."""

    @property
    def streams(self) -> tuple[MixedSource, ...]:
        """Every source of a mixture, or of all domains; empty if there is one source."""
        return tuple(each for domain in self.domains for each in domain.streams) or self.sources

    @property
    def is_images(self) -> bool:
        """Whether the examples are images rather than text."""
        return isinstance(self.source, DigitsSource)

    @property
    def tokens_per_sequence(self) -> int:
        """S: `sequence_length`, or the number of patches per image."""
        return self.source.num_patches if isinstance(self.source, DigitsSource) else self.sequence_length


def known_vocab_size(config: DataConfig) -> int | None:
    """The size of the tokenizer's vocabulary, as far as the config says it; None for a file."""
    tokenizer = config.tokenizer
    return 257 if isinstance(tokenizer, ByteTokenizer) else getattr(tokenizer, "vocab_size", None)


def shares(mixture: Sequence[MixedSource] | Sequence[Denoiser]) -> list[float]:
    """What part of the sequences each source or denoiser of a mixture gives."""
    return [each.weight / sum(every.weight for every in mixture) for each in mixture]
