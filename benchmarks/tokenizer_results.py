"""Tokenizers of several sizes on held-out text: what the papers say of Scaffold-BPE and LBPE, measured.

    python benchmarks/tokenizer_results.py OUT --text PATHS --held-out PATHS [--sizes 4000 8000 16000 32000]

Pre-tokens are counted once. For each size, BPE and Scaffold-BPE are trained and each is encoded by merges and by LBPE.
OUT gets the tokenizers, and for each size what `moeport tokenizer eval` writes; the table is printed as Markdown, one
line for each tokenizer. Tokenizers and figures that are there are read, so an interrupted run continues.

Without --text, the texts are the standard library and the installed packages, of which every twentieth document is held
out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizer_texts import read_texts

from moeport.files import write_json, write_text
from moeport.studies.tokenizers.evaluate import evaluate
from moeport.studies.tokenizers.export import to_json
from moeport.studies.tokenizers.page import write_page
from moeport.studies.tokenizers.subject import open_subjects
from moeport.tokenizers import count_words, train
from moeport.tokenizers.definition import Definition, write_definition
from moeport.tokenizers.patterns import PATTERNS

KINDS = {
    "bpe": ("bpe", "merges"),
    "scaffold_bpe": ("scaffold_bpe", "merges"),
    "lbpe": ("bpe", "longest_first"),
    "lbpe over scaffold_bpe": ("scaffold_bpe", "longest_first"),
    "lbpe, longest merge": ("bpe", "longest_merge"),
}
"""By name, how the vocabulary is trained and how text is encoded."""
COLUMNS = (
    "size, tokenizer",
    "bytes per token",
    "against bpe",
    "H, bits",
    "R",
    "H per byte",
    "unused",
    "scaffolds",
    "replaced",
    "gain",
)
HELD_OUT_EVERY = 20


def make_tokenizers(folder: Path, words: Mapping[bytes, int], size: int, pattern: str) -> list[str]:
    """Train and write the tokenizers of a size that are not there; gives the arguments of `open_subjects`."""
    named = []
    vocabularies: dict[str, Any] = {}
    for name, (algorithm, encoding) in KINDS.items():
        path = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{size}.json"
        named.append(f"{name}={path}")
        if path.is_file():
            continue
        if algorithm not in vocabularies:
            start = time.perf_counter()
            vocabularies[algorithm] = train(words, size, algorithm)
            seconds = time.perf_counter() - start
            found = vocabularies[algorithm]
            print(f"{algorithm}, {size:,}: {len(found.scaffolds):,} scaffolds, {seconds:.1f} s of merging", flush=True)
        write_text(path, write_definition(Definition(vocabularies[algorithm], encoding, pattern)))
    return named


def measure(folder: Path, named: Sequence[str], held_out: Sequence[str], size: int, folds: int) -> Mapping[str, Any]:
    """The figures of a size, as `moeport tokenizer eval --json` writes them."""
    path = folder / f"figures-{size}.json"
    if not path.is_file():
        found = evaluate(open_subjects(named), held_out, folds)
        write_page(folder / f"figures-{size}.html", found)
        write_json(path, to_json(found))
    return json.loads(path.read_text(encoding="utf-8"))


def row(size: int, found: Mapping[str, Any]) -> list[str]:
    """A line of the table."""
    figures = {name: value["value"] for name, value in found["figures"].items()}
    against = found["to_first"].get("bytes_per_token")
    replaced, vocabulary = found["replaced"], found["vocabulary"]
    return [
        f"{size:,}, {found['name']}",
        f"{figures['bytes_per_token']:.4f}",
        "" if against is None else f"{against['mean']:+.2%} [{against['low']:+.2%}, {against['high']:+.2%}]",
        f"{figures['entropy']:.4f}",
        f"{figures['redundancy']:.4f}",
        f"{figures['unigram_bits_per_byte']:.4f}",
        f"{figures['unused']:.2%}",
        f"{found['scaffolds'] / vocabulary:.2%}" if found["scaffolds"] else "",
        "" if replaced is None else f"{replaced['number'] / vocabulary:.2%}",
        "" if replaced is None else f"{replaced['gain']:+.1%}",
    ]


def main() -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder for tokenizers, figures and pages")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="files and folders to train on")
    parser.add_argument("--held-out", type=Path, nargs="*", default=[], help="files and folders to measure on")
    parser.add_argument("--megabytes", type=float, default=100.0, help="text to read at most")
    parser.add_argument("--sizes", type=int, nargs="*", default=[4000, 8000, 16000, 32000], help="tokens")
    parser.add_argument("--pattern", choices=PATTERNS, default="digits")
    parser.add_argument("--folds", type=int, default=10)
    options = parser.parse_args()
    texts = read_texts(options.text, options.megabytes)
    if options.held_out:
        held_out = read_texts(options.held_out, options.megabytes)
    else:
        held_out = texts[::HELD_OUT_EVERY]
        del texts[::HELD_OUT_EVERY]
    sizes = [sum(len(text.encode()) for text in part) / 1e6 for part in (texts, held_out)]
    start = time.perf_counter()
    words = count_words(texts, options.pattern)
    print(
        f"{sizes[0]:.1f} MB to train on, {sizes[1]:.2f} MB held out; {len(words):,} distinct pre-tokens, counted in "
        f"{time.perf_counter() - start:.1f} s",
        flush=True,
    )
    del texts
    options.folder.mkdir(parents=True, exist_ok=True)
    lines: list[Sequence[str]] = [COLUMNS, ["---", *["---:"] * (len(COLUMNS) - 1)]]
    for size in options.sizes:
        named = make_tokenizers(options.folder, words, size, options.pattern)
        found = measure(options.folder, named, held_out, size, options.folds)
        lines += [row(size, each) for each in found["tokenizers"]]
    for line in lines:
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
