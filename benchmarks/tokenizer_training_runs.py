"""The quickstart trained with each tokenizer on the same bytes: validation bits per byte side by side.

    python benchmarks/tokenizer_training_runs.py [--text NAME=PATH ...] [--seeds 0,1,2] [--steps 2000]

Everything but the tokenizer is equal. A tokenizer with more bytes per token would see more text in as many steps, so
the others get as many steps as show the model as many bytes of text as `bpe` sees in --steps. Bits per byte do not
depend on what a token is; losses per token do. The corpora are the quickstart's own and, for each --text, one of files
or folders. After an interruption, repeat the command: finished runs are read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from claims import difference, mean, shown, values

from moeport.config import load_config, resolved_yaml
from moeport.data import PackedTokens, prepare_data
from moeport.files import write_json, write_text
from moeport.pages.console import PlainConsole
from moeport.studies.compare.compare import compare
from moeport.studies.compare.outcome import Comparison
from moeport.studies.compare.page import write_page
from moeport.studies.compare.plan import plan

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
TOKENIZERS = {
    "bpe": {"name": "bpe"},
    "scaffold_bpe": {"name": "scaffold_bpe"},
    "lbpe": {"name": "lbpe", "base": "bpe"},
    "lbpe_over_scaffold_bpe": {"name": "lbpe", "base": "scaffold_bpe"},
}
"""By name, `data.tokenizer`; the first is the one that the others are compared with."""
ALLOWED = ("data.tokenizer", "training.steps")
SIZE = 4096
FIGURE = "val_bits_per_byte"
Source = Sequence[str]
"""KEY=VALUE of `data.source`."""


def settings(tokenizer: Mapping[str, str], source: Source, given: argparse.Namespace, steps: int) -> list[str]:
    """What is laid over the quickstart."""
    chosen = json.dumps({**tokenizer, "vocab_size": given.vocab_size})
    return [
        *source,
        f"data.tokenizer={chosen}",
        f"training.steps={steps}",
        "training.evaluation_interval=0",
        "metrics.report=false",
        "metrics.sample_tokens=0",
        *given.set,
    ]


def write_configs(folder: Path, source: Source, given: argparse.Namespace) -> tuple[list[Path], dict[str, float]]:
    """A config for each tokenizer, with the steps that make the bytes equal; and the bytes per token of each."""
    ratios: dict[str, float] = {}
    files = []
    for name, tokenizer in TOKENIZERS.items():
        config = load_config(QUICKSTART, settings(tokenizer, source, given, given.steps))
        train = prepare_data(config.data, report=print).train
        assert isinstance(train, PackedTokens)
        ratios[name] = train.num_bytes / train.num_tokens
        steps = round(given.steps * ratios[next(iter(TOKENIZERS))] / ratios[name])
        files.append(folder / "configs" / f"{name}.yaml")
        write_text(files[-1], resolved_yaml(load_config(QUICKSTART, settings(tokenizer, source, given, steps))))
    return files, ratios


def trained(folder: Path, source: Source, given: argparse.Namespace) -> tuple[Comparison, dict[str, float]]:
    """Train what is not trained yet. Raises SystemExit if a run failed."""
    files, ratios = write_configs(folder, source, given)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    runs = plan(files, folder, seeds=seeds, baseline=next(iter(TOKENIZERS)), allowed=ALLOWED)
    found = compare(runs, console=PlainConsole())
    write_page(found, folder)
    if problems := [f"{each.run.dir}: {each.problem}" for each in found.outcomes if each.problem]:
        raise SystemExit("\n".join([found.interruption, *problems]))
    return found, ratios


def table(corpus: str, found: Comparison, ratios: Mapping[str, float]) -> dict[str, Any]:
    """Print the table of a corpus; gives its figures."""
    print(
        f"\n**{corpus}**\n\n| Tokenizer | Bytes per token | Steps | Bits per byte | To `bpe` |\n|---|--:|--:|--:|--:|"
    )
    figures: dict[str, Any] = {}
    baseline = values(found, found.plan.baseline, FIGURE)
    for name in found.plan.names:
        own, steps = values(found, name, FIGURE), found.plan.config(name).training.steps
        to = difference(own, baseline)
        figures[name] = {"bytes_per_token": ratios[name], "steps": steps, FIGURE: own, "difference": asdict(to)}
        cell = "" if name == found.plan.baseline else f"{shown(to)}, {to.verdict}"
        print(f"| `{name}` | {ratios[name]:.4f} | {steps:,} | {mean(own)} | {cell} |")
    return figures


def main() -> None:
    """Train, and print a table for each corpus."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", default=[], metavar="NAME=PATH", help="a further corpus; repeatable")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=2000, help="of bpe")
    parser.add_argument("--vocab-size", type=int, default=SIZE)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/tokenizers"), help="repeat to continue")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for every run")
    given = parser.parse_args()
    corpora: dict[str, Source] = {"stdlib": ["data.source.name=stdlib"]}
    for text in given.text:
        name, _, path = text.partition("=")
        corpora[name] = ["data.source.name=files", f"data.source.paths={json.dumps([path])}"]
    figures = {}
    for name, source in corpora.items():
        found, ratios = trained(given.output_dir / name, source, given)
        figures[name] = table(name, found, ratios)
    write_json(given.output_dir / "tokenizers.json", figures)


if __name__ == "__main__":
    main()
