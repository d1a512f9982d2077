"""`moeport tokenizer`."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from moeport.cli.options import Flags, check_plot, grouped, output_file, output_folder
from moeport.cli.progress import FileProgress, counted
from moeport.cli.texts import SourceOverrides, TextFiles, Texts

if TYPE_CHECKING:
    from moeport.studies.tokenizers.evaluate import Measured
    from moeport.tokenizers.definition import Definition
    from moeport.tokenizers.id_files import Blocks

app = typer.Typer(
    name="tokenizer",
    help="Train byte-level tokenizers (BPE, Scaffold-BPE, LBPE), encode and decode with them, and measure them.",
    no_args_is_help=True,
)

TokenizerFile = Annotated[
    Path,
    typer.Argument(
        metavar="TOKENIZER",
        help="A tokenizer.json, a folder that has one, or a name on the Hugging Face hub.",
        show_default=False,
    ),
]
ENCODING = typer.Option(
    metavar="NAME",
    help="merges: by rank of the merges; longest_first: LBPE, the longest token first; longest_merge: LBPE, the merge "
    "that makes the longest token first. Default: that of the algorithm or of the file.",
    show_default=False,
)
Encoding = Annotated[str | None, ENCODING]
Workers = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Processes or threads. Default: one per core.", show_default=False),
]


@dataclass(frozen=True)
class Kind:
    """What `train` trains."""

    algorithm: str = "scaffold_bpe"
    vocab_size: int = 32000
    encoding: str | None = None
    pattern: str = "digits"
    special: list[str] | None = None
    choose: list[str] | None = None


KindFlags = Annotated[
    Kind,
    Flags(
        algorithm=typer.Option(
            metavar="NAME", help="bpe; scaffold_bpe; or lbpe: trained as bpe, encoded longest token first."
        ),
        vocab_size=typer.Option(
            min=257, metavar="N", help="Ids: the 256 bytes, merged tokens without scaffolds, and special tokens."
        ),
        encoding=ENCODING,
        pattern=typer.Option(
            metavar="NAME|REGEX",
            help="What cuts text into pre-tokens, which no token crosses: gpt2, gpt4, digits (as gpt2, with every "
            "digit by itself), moeport (that of data.tokenizer.name bpe), or a regular expression.",
        ),
        special=typer.Option(
            metavar="TOKEN", help="Special token; repeatable. Default: <|endoftext|>.", show_default=False
        ),
        choose=typer.Option(
            metavar="KEY=VALUE",
            help="What the papers leave open, as in --choose pair_ties=oldest; docs/tokenizers.md lists the choices. "
            "Repeatable.",
            show_default=False,
        ),
    ),
]


@dataclass(frozen=True)
class Files:
    """What `eval` writes besides the tables on the terminal."""

    html_file: Path | None = None
    json_file: Path | None = None
    markdown_file: Path | None = None
    plot_file: Path | None = None


FileFlags = Annotated[
    Files,
    Flags(
        html_file=output_file("--html", help="Write one HTML page with tables and charts."),
        json_file=output_file("--json", help="Write all figures as JSON."),
        markdown_file=output_file("--markdown", help="Write the tables as Markdown."),
        plot_file=output_file(
            "--plot", help="Plot frequencies and lengths as .png, .svg or .pdf; needs matplotlib.", check=check_plot
        ),
    ),
]


@app.command("train")
@grouped
def train(
    output: Annotated[Path, output_file("-o", "--output", metavar="FILE", help="The tokenizer.json to write.")],
    text: TextFiles = [],  # noqa: B006
    overrides: SourceOverrides = None,
    *,
    kind: KindFlags,
    workers: Workers = None,
) -> None:
    """Train a tokenizer on text, which need not fit into memory.

    The same text gives the same tokenizer, whatever the number of processes and the order of files.

    Example: moeport tokenizer train --text data/ --algorithm scaffold_bpe --vocab-size 32000 -o scaffold.json
    """
    from moeport.files import write_text
    from moeport.pages.console import wide_console
    from moeport.studies.tokenizers.train import checked, trained
    from moeport.tokenizers.definition import write_definition

    plan, texts, start = checked(**vars(kind)), Texts(text, overrides), time.monotonic()
    with FileProgress() as progress, _plain_warnings():
        documents = (document for _, document in texts.read(progress.add))
        definition = trained(plan, documents, workers, lambda size: progress.show(counted(size, plan.tokens, "tokens")))
    write_text(output, write_definition(definition))
    console = wide_console()
    for line in texts.lines():
        console.print(line, soft_wrap=True)
    console.print(f"{output}: {_described(definition)}; {time.monotonic() - start:.1f} s", soft_wrap=True)


@app.command("encode")
def encode(
    tokenizer: TokenizerFile,
    strings: Annotated[
        list[str],
        typer.Argument(metavar="[STRING]...", help="Texts; - is standard input, of any length.", show_default=False),
    ] = [],  # noqa: B006
    text: TextFiles = [],  # noqa: B006
    overrides: SourceOverrides = None,
    encoding: Encoding = None,
    special: Annotated[
        bool, typer.Option("--special", help="Special tokens spelled out in a STRING become their ids.")
    ] = False,
    output: Annotated[
        Path | None,
        output_file(
            "-o",
            "--output",
            help="Write .jsonl: an object with name and ids per document; or .bin: ids as little-endian uint32, each "
            "document with <|endoftext|> after it, if there is such a token.",
        ),
    ] = None,
    workers: Workers = None,
) -> None:
    """Turn texts into ids: a line of numbers for each STRING, an object per line for the documents of files.

    Example: moeport tokenizer encode scaffold.json "Hello world"
    """
    from moeport.studies.tokenizers.coding import Coding

    coding = Coding(tokenizer, encoding, workers)
    if strings and (text or overrides):
        from moeport.errors import UserError

        raise UserError("texts are given twice: expected either STRING or --text and --set")
    with FileProgress() as progress, _sink(output) as stream:
        documents: Iterable[tuple[str, Blocks]] = (
            (
                (each, coding.stream(sys.stdin.buffer) if each == "-" else [coding.ids(each, special)])
                for each in strings
            )
            if strings
            else coding.documents(Texts(text, overrides).read(progress.add))
        )
        write = coding.writer(output, plain=bool(strings))
        for name, blocks in documents:
            write(stream, name, blocks)


@app.command("decode")
def decode(
    tokenizer: TokenizerFile,
    ids: Annotated[
        list[str], typer.Argument(metavar="[ID]...", help="Ids; - is standard input.", show_default=False)
    ] = [],  # noqa: B006
    file: Annotated[
        Path | None,
        typer.Option(
            "--ids",
            metavar="FILE",
            help="A .jsonl or .bin file written by `encode`, or numbers in plain text.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, output_file("-o", "--output", help="Write the bytes to a file instead of standard output.")
    ] = None,
) -> None:
    """Turn ids into the bytes that they stand for; special tokens are spelled out.

    Example: moeport tokenizer decode scaffold.json 15496 995
    """
    from moeport.errors import UserError
    from moeport.studies.tokenizers.coding import Coding
    from moeport.tokenizers.id_files import read_ids, read_plain

    if bool(ids) == (file is not None):
        raise UserError("expected either ids or --ids FILE")
    coding = Coding(tokenizer)
    if file is not None:
        documents: Iterable[Blocks] = (blocks for _, blocks in read_ids(file))
    else:
        documents = [read_plain(sys.stdin.buffer, "standard input") if ids == ["-"] else coding.numbers(ids)]
    with _sink(output) as stream:
        for blocks in documents:
            for block in blocks:
                stream.write(coding.bytes(block))
        if ids and ids != ["-"] and output is None:
            stream.write(b"\n")


@app.command("export")
def export(
    tokenizer: TokenizerFile,
    output: Annotated[Path, output_folder("-o", "--output", help="Folder to write.")],
    encoding: Encoding = None,
    end_of_text: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN", help="The token that ends a document. Default: <|endoftext|>, if there is such a token."
        ),
    ] = None,
) -> None:
    """Write a folder that AutoTokenizer of transformers opens.

    With --encoding longest_first, byte-level BPE that was trained elsewhere becomes LBPE with the same ids. Folders of
    Scaffold-BPE and LBPE hold code, so they are opened with trust_remote_code=True.

    Example: moeport tokenizer export scaffold.json -o scaffold-tokenizer
    """
    from moeport.studies.tokenizers.export_folder import export_folder

    typer.echo(export_folder(tokenizer, output, encoding, end_of_text))


@app.command("eval")
@grouped
def evaluate(
    tokenizers: Annotated[
        list[str],
        typer.Argument(
            metavar="TOKENIZER...",
            help="Each a tokenizer.json, a folder that has one, or a name on the hub; NAME=PATH gives it a name. "
            "The others are compared with the first.",
            show_default=False,
        ),
    ],
    text: TextFiles = [],  # noqa: B006
    overrides: SourceOverrides = None,
    folds: Annotated[int, typer.Option(min=1, metavar="N", help="Number of parts of the text, for the spread.")] = 5,
    *,
    files: FileFlags,
) -> None:
    """Measure tokenizers side by side on text that they were not trained on.

    Bytes per token, entropy, redundancy, frequencies and lengths of tokens, and what Scaffold-BPE replaced. Memory does
    not depend on the size of the text.

    Example: moeport tokenizer eval bpe=bpe.json scaffold.json --text held-out/ --html tokenizers.html
    """
    from moeport.pages.console import wide_console
    from moeport.studies.tokenizers.evaluate import evaluate as measure
    from moeport.studies.tokenizers.subject import open_subjects
    from moeport.studies.tokenizers.table import explanations, tables

    subjects, texts = open_subjects(tokenizers), Texts(text, overrides)
    with FileProgress() as progress:
        found = measure(subjects, (document for _, document in texts.read(progress.add)), folds)
    console = wide_console()
    for table in tables(found):
        console.print(table.drawn(), crop=False)
    for line in [*explanations(found), *texts.lines()]:
        console.print(line, soft_wrap=True)
    _write(found, files)


def _write(found: list[Measured], files: Files) -> None:
    from moeport.files import write_json, write_text
    from moeport.studies.tokenizers.export import to_json
    from moeport.studies.tokenizers.page import write_page
    from moeport.studies.tokenizers.plot import write_plot
    from moeport.studies.tokenizers.table import markdown

    if files.html_file:
        write_page(files.html_file, found)
    if files.json_file:
        write_json(files.json_file, to_json(found))
    if files.markdown_file:
        write_text(files.markdown_file, markdown(found))
    if files.plot_file:
        write_plot(files.plot_file, found)


@contextmanager
def _sink(output: Path | None) -> Iterator[BinaryIO]:
    """Standard output, or a file that is written whole or not at all."""
    from moeport.files import atomic_file

    if output is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    with atomic_file(output) as temporary, temporary.open("wb") as stream:
        yield stream


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings of training as sentences, without the place in the code."""
    from moeport.pages.console import PlainConsole

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        PlainConsole(stderr=True).print(f"warning: {warning.message}", soft_wrap=True)


def _described(definition: Definition) -> str:
    """One line on a tokenizer."""
    vocabulary = definition.vocabulary
    scaffolds = f", {len(vocabulary.scaffolds):,} scaffolds" if vocabulary.algorithm == "scaffold_bpe" else ""
    return (
        f"{vocabulary.algorithm}, encoding {definition.encoding}, {definition.size:,} ids "
        f"({len(vocabulary.tokens):,} tokens, {len(definition.special_tokens)} special){scaffolds}"
    )
