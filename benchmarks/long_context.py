"""HARPE's claim: with a base of the rotary angles for each head, a model goes on to a longer context better.

    python benchmarks/long_context.py [--output-dir runs/long-context] [--seeds 0,1,2] [--set KEY=VALUE ...]

Each seed trains a model on sequences of `--length` tokens for `--short` steps. From its checkpoint every arm goes on
with sequences of four times the length, for `--long` steps of equally many tokens: with HARPE's bases (`uniform`,
`peak_valley`), with one larger base (ABF), with position interpolation, with YaRN, and with no change, the control. All
are measured at 1, 2, 4 and 8 times the length, on held-out text: needles, and the loss by position. Figures *beyond*
are those of lengths and positions above the first length, up to four times that, which is what the arms trained on.

By default half of the training text (`--mix`) is made from the other half: documents with needles in them, and texts
that are repeated, since models of this size learn to look back from few tokens only where much depends on it. `--text`
names other text than Python's standard library, `--arms` some of the arms. With `--checkpoint SEED` the arms of all
seeds go on from the checkpoint of that one, and the spread is that of the continuation alone. Repeat the command to go
on after an interruption.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from claims import (
    RATE,
    SMALL,
    Arm,
    Given,
    Report,
    better,
    compared,
    comparisons,
    difference,
    mean,
    options,
    plain,
    shown,
)

from moeport.config import load_config
from moeport.data.sources import read_documents
from moeport.data.tokenizer import ByteTokenizer
from moeport.files import write_json, write_text
from moeport.studies.compare.plan import PlannedRun
from moeport.studies.long_context.measure import Wanted, measure
from moeport.studies.long_context.needles import FORMS as NEEDLE_FORMS
from moeport.studies.long_context.needles import Options, question
from moeport.studies.long_context.text import Haystack, Text, files_text
from moeport.training.trained import trained_text

TIMES = 4
"""The longer context, as a multiple of the shorter."""
LOW, HIGH = 20_000, 100_000
"""HARPE's lowest and highest base; ABF has the highest, as in the paper, where they are 1M and 5M. Ours: the paper goes
from 4k to 128k, 32 times the length, and this to 4 times."""
STEP = 600
"""Of the search: as many candidates as the paper's."""
CONTROL, ABF = "none", "abf"
ROPE = {
    CONTROL: (),
    "interpolation": (f"model.attention.rope_scaling={{type: linear, factor: {TIMES}}}",),
    ABF: (f"model.attention.rope_base={HIGH}",),
    "yarn": (f"model.attention.rope_scaling={{type: yarn, factor: {TIMES}, original_positions: LENGTH}}",),
    "harpe-uniform": (f"model.attention.rope_bases={{kind: uniform, low: {LOW}, high: {HIGH}}}",),
    "harpe-peak-valley": (f"model.attention.rope_bases={{kind: peak_valley, low: {LOW}, high: {HIGH}, step: {STEP}}}",),
}
"""How each arm changes positions; LENGTH stands for the first length."""
SIZE = (
    "model.d_model=128",
    "model.attention.num_heads=4",
    "model.moe.expert_hidden=128",
    "optimizer.schedule.warmup_steps=50",
)
TOKENS = 2048
"""Of a step."""
RATE_BEFORE, RATE_AFTER = "0.01", "0.003"
FORMS = ("single", "multi_key", "multi_value")
"""Those with room in the default length; variable tracking takes about 170 tokens."""
COPY = "copy"
KINDS = (*FORMS, COPY, COPY)
"""Of the documents that are mixed in, drawn with equal shares."""
NEEDLES = 4
MEGABYTES = 8.0
"""Of text that is trained on, without needles."""
BYTES_PER_TOKEN = 2.4
LEAST_BYTES = {"single": 120, "multi_key": 220, "multi_value": 240}
"""Of a document with needles, by form: what its needles and question need."""
LEAST_COPY = 60
"""Bytes of a text that is repeated."""
MORE = re.compile(r"The number of (\w+) is (\d+)\.\n")
SAMPLES = 20
FIGURES = {
    "loss, first length": "loss_first",
    "loss beyond": "loss_beyond",
    "needles missed beyond": "missed_beyond",
    "wrong choices beyond": "wrong_beyond",
    "nats of answers beyond": "nats_beyond",
}
"""Figures by title; lower is better in all."""


def text_files(given: Given, name: str, length: int) -> dict[str, str]:
    """Training and validation text for sequences of a length, written once; paths by side.

    Raises SystemExit if the text that is there was made with other options.
    """
    folder = given.folder / "text" / name
    files = {side: str(folder / f"{side}.jsonl") for side in ("train", "validation")}
    paths, mix, record = given.own["text"], float(given.own["mix"]), folder / "options.json"
    made_with = {"text": paths, "mix": mix, "length": length}
    if record.exists() and (found := json.loads(record.read_text(encoding="utf-8"))) != made_with:
        raise SystemExit(f"{folder}: made with {found}, not {made_with}; expected the same, or another --output-dir")
    if not Path(files["validation"]).exists():
        settings = [f"data.source={{name: files, paths: {json.dumps([paths])}}}"] if paths else []
        corpus = read_documents(load_config(None, settings).data)
        real = _first((each.text for each in corpus.train), MEGABYTES * 1e6)
        needles = looking_back(real, length, mix)
        write_text(Path(files["train"]), _rows([*real, *needles]))
        write_text(Path(files["validation"]), _rows([each.text for each in corpus.validation]))
        write_json(record, made_with)
    return files


def _first(texts: Iterator[str], characters: float) -> list[str]:
    """The first texts, of at most this many characters together, but one at least."""
    found: list[str] = []
    for text in texts:
        found.append(text)
        characters -= len(text)
        if characters <= 0:
            break
    return found


def _rows(texts: Sequence[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def looking_back(real: Sequence[str], length: int, mix: float) -> Iterator[str]:
    """Documents that can only be predicted by looking back, which make up a share `mix` of the whole text.

    Most have needles and an answered question; the others are a stretch of text that is repeated, of which each token
    of the second half tells whether the model finds what it has read. They are up to nine tenths of `length` tokens
    long, by a rough estimate.
    """
    if not mix:
        return
    rng, haystack = np.random.default_rng(0), Haystack.of(Text(real, ""), ByteTokenizer())
    wanted = sum(map(len, real)) * mix / (1 - mix)
    while wanted > 0:
        kind = KINDS[rng.integers(len(KINDS))]
        most = round(0.9 * length * BYTES_PER_TOKEN)
        text = twice(haystack, rng, most) if kind == COPY else answered(haystack, rng, kind, most)
        wanted -= len(text)
        yield text


def twice(haystack: Haystack, rng: np.random.Generator, most: int) -> str:
    """A stretch of real text and the same again, of at most `most` bytes."""
    size = int(rng.integers(min(LEAST_COPY, most // 2), most // 2 + 1))
    start = int(rng.integers(len(haystack.id_T) - size + 1))
    return 2 * haystack.tokenizer.decode(haystack.id_T[start : start + size])


def answered(haystack: Haystack, rng: np.random.Generator, form: str, most: int) -> str:
    """A prompt with its answer; with several keys, followed by the needles of those that were not asked for."""
    least = LEAST_BYTES[form]
    size = int(rng.integers(least, max(least, most) + 1))
    depth = float(rng.random()) if NEEDLE_FORMS[form].has_depth else None
    each = question(haystack, form, size, depth, rng, NEEDLES)
    text = haystack.tokenizer.decode(np.concatenate([each.prompt_T[1:], each.answer]))
    if form == "multi_key":
        pairs = [pair for pair in MORE.findall(text) if pair[1] != each.wanted[0]]
        text += "".join(f".\nThe number of {key} is {value}" for key, value in pairs)
    return text


def arm(files: Mapping[str, str], length: int, steps: str, *settings: str) -> Arm:
    """A config that trains on sequences of a length, with as many tokens in a step as any other."""
    sides = {"paths": [files["train"]], "validation_paths": [files["validation"]]}
    source = json.dumps({"name": "files", **sides})
    sizes = (f"data.sequence_length={length}", f"training.batch_size={max(1, TOKENS // length)}")
    return Arm("topk", (*SIZE, f"data.source={source}", *sizes, f"training.steps={steps}", *settings))


def arms(given: Given, first: PlannedRun, files: Mapping[str, str], length: int) -> dict[str, Arm]:
    """What goes on from a run."""
    tokenizer = json.dumps({"name": "file", "path": str(first.dir / "tokenizer.json")})
    common = (f"{RATE}={RATE_AFTER}", f"data.tokenizer={tokenizer}", f"training.start_from={first.dir}")
    size = tuple(each for each in SMALL if not each.startswith("data.tokenizer"))
    made = {
        name: arm(
            files,
            TIMES * length,
            given.own["long"],
            *common,
            *(each.replace("LENGTH", str(length)) for each in ROPE[name]),
        )
        for name in given.own["arms"].split(",")
    }
    return {name: replace(each, size=size) for name, each in made.items()}


def seeds_from(given: Given) -> dict[int, tuple[int, ...]]:
    """Which seeds go on from the checkpoint of each seed. Raises SystemExit for one that is not a number."""
    one = given.own["checkpoint"]
    if not one:
        return {seed: (seed,) for seed in given.seeds}
    if not one.isdecimal():
        raise SystemExit(f"--checkpoint {one}: expected a seed, such as 0")
    return {int(one): given.seeds}


def measured(run_dir: Path, text: Text, length: int, samples: int) -> dict[str, Any]:
    """What `moeport eval --needle --by-position` gives for a run; kept in its folder."""
    lengths = tuple(length * times for times in (1, 2, TIMES, 2 * TIMES))
    asked = Options(lengths, forms=FORMS, samples=samples, needles=NEEDLES)
    file, key = run_dir / "long_context.json", repr(asked)
    if file.exists() and (found := json.loads(file.read_text(encoding="utf-8")))["asked"] == key:
        return dict(found)
    print(f"measuring {run_dir}", flush=True)
    figures = measure(trained_text(run_dir), run_dir.name, text, Wanted(asked, positions=True, batch_size=16), _quiet)
    write_json(file, {"asked": key, **figures.as_json()})
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _quiet(done: int, total: int) -> None:
    """Tell nothing."""


def figures_of(found: Mapping[str, Any], length: int) -> dict[str, float]:
    """The figures of one run, as FIGURES names them."""
    blocks = found["positions"]["blocks"]
    beyond = [each for each in found["needles"] if each["depth"] is None and length < each["length"] <= TIMES * length]

    def loss(low: int, high: int) -> float:
        return float(np.mean([each["loss"] for each in blocks if low < each["last"] <= high]))

    return {
        "loss_first": loss(0, length),
        "loss_beyond": loss(length, TIMES * length),
        "missed_beyond": 1 - float(np.mean([each["exact"] for each in beyond])),
        "wrong_beyond": 1 - float(np.mean([each["choice"] for each in beyond])),
        "nats_beyond": float(np.mean([each["nats"] for each in beyond])),
    }


def report_on(found: Mapping[str, Mapping[int, dict[str, Any]]], length: int, report: Report) -> None:
    """The table of all figures, the table of needles by length, and the verdicts against ABF and the control.

    Args:
        found: what was measured, by arm and seed.
        length: the first length.
        report: where it is said.
    """
    values = {
        name: {
            figure: {seed: figures_of(each, length)[figure] for seed, each in by_seed.items()}
            for figure in FIGURES.values()
        }
        for name, by_seed in found.items()
    }
    report.say(f"| Positions | {' | '.join(FIGURES)} |", f"|---|{'--:|' * len(FIGURES)}")
    for name, own in values.items():
        report.say(f"| `{name}` | {' | '.join(mean(own[figure]) for figure in FIGURES.values())} |")
    _by_length(found, report)
    report.say("", "| Positions | Figure | to the control | Better? | to ABF | Better? |", "|---|---|--:|---|--:|---|")
    for name, own in values.items():
        for title, figure in FIGURES.items():
            cells = []
            for other in (CONTROL, ABF):
                if name in (other, "before") or other not in values:
                    cells += ["-", "-"]
                    continue
                to = difference(own[figure], values[other][figure])
                cells += [shown(to), better(to)]
                told = report.figures.setdefault("verdicts", {}).setdefault(f"{name} to {other}", {})
                told[figure] = plain(to, better(to))
            report.say(f"| `{name}` | {title} | {' | '.join(cells)} |")


def _by_length(found: Mapping[str, Mapping[int, dict[str, Any]]], report: Report) -> None:
    """Exact answers and right choices at each length, mean over the forms."""
    first = next(iter(next(iter(found.values())).values()))
    lengths = sorted({each["length"] for each in first["needles"]})

    def share(each: Mapping[str, Any], length: int, kind: str) -> float:
        return float(np.mean([x[kind] for x in each["needles"] if x["depth"] is None and x["length"] == length]))

    for kind, title in (("exact", "Exact answers"), ("choice", f"Right choices ({1 / NEEDLES:.0%} by chance)")):
        report.say("", f"| {title}, tokens | {' | '.join(map(str, lengths))} |", f"|---|{'--:|' * len(lengths)}")
        for name, by_seed in found.items():
            at = [{seed: share(each, length, kind) for seed, each in by_seed.items()} for length in lengths]
            report.say(f"| `{name}` | {' | '.join(mean(each, '{:.1%}') for each in at)} |")


def main() -> None:
    """Train, go on, measure, and print the tables."""
    own = {"length": "128", "short": "12000", "long": "400", "mix": "0.5", "text": "", "samples": str(SAMPLES)}
    given = options(__doc__, "runs/long-context", **own, arms=",".join(ROPE), checkpoint="")
    going_on = seeds_from(given)
    length, samples = int(given.own["length"]), int(given.own["samples"])
    files = {name: text_files(given, name, size) for name, size in (("short", length), ("long", TIMES * length))}
    before = arm(files["short"], length, given.own["short"], f"{RATE}={RATE_BEFORE}")
    first = compared({"before": before}, replace(given, seeds=tuple(going_on)), "before")
    text = files_text([files["long"]["validation"]])
    found: dict[str, dict[int, dict[str, Any]]] = {"before": {}}
    after = []
    for run in first.plan.runs:
        found["before"][run.seed] = measured(run.dir, text, length, samples)
        of_seed = replace(given, seeds=going_on[run.seed])
        each = compared(
            arms(given, run, files["long"], length), of_seed, f"after-{run.seed}", allowed=("model.attention",)
        )
        after.append(each)
        for other in each.plan.runs:
            found.setdefault(other.name, {})[other.seed] = measured(other.dir, text, length, samples)
    report = Report(given)
    report_on(found, length, report)
    report.figures["comparisons"] = comparisons(first, *after)
    report.figures["measured"] = found
    report.write()


if __name__ == "__main__":
    main()
