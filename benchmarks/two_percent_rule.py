"""Faults that a comparison of losses lets pass: the rule "within 2% of loss" against `moeport parity`.

Each fault of the test suite is put into one of two training runs on the Python standard library's sources. The rule
takes the mean over steps of |b - a| / a of the loss, the form in which it is used to accept training on another device.
The last column is what parity says about the same pair of runs. The first row has no fault: float32 against bfloat16.

    python -m benchmarks.two_percent_rule [--steps 60]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from moeport.config import config_from_dict, resolved_yaml
from moeport.parity.run import compare_subjects
from moeport.parity.subject import Size, Subject, build_subject
from tests.parity.faults import FAULTS, with_fault
from tests.parity.tiny import MODEL

RULE = 0.02
OPTIMIZER = {"learning_rate": 1e-3, "schedule": {"name": "constant", "warmup_steps": 20}}


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    size = Size(sequences=8, tokens=128, steps=steps)
    config = {
        "model": MODEL,
        "data": {"tokenizer": {"name": "byte"}},
        "optimizer": OPTIMIZER,
        "training": {"steps": max(steps, 21)},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(resolved_yaml(config_from_dict(config)))

        def build(overrides: tuple[str, ...] = (), spec: str = "torch-cpu") -> Subject:
            return build_subject(file, spec, overrides, size=size)

        pairs = {"none: bfloat16 in place of float32": (build(), build(spec="torch-cpu:bf16"))}
        pairs |= {fault.name: with_fault(fault, build) for fault in FAULTS}
        print(f"| Fault | First step | Mean of {steps} steps | 2% rule | moeport parity |")
        print("|---|---|---|---|---|")
        passed = 0
        for name, pair in pairs.items():
            (found,) = compare_subjects(pair, steps).comparisons
            mean = sum(step.difference for step in found.trajectory) / steps
            passed += mean < RULE
            says = found.headline.partition(": ")[0] if found.culprit else found.verdict.upper()
            verdict = "pass" if mean < RULE else "fail"
            first = found.trajectory[0].difference
            print(f"| {name} | {first:.3%} | {mean:.3%} | {verdict} | `{says}` |", flush=True)
    print(f"\nOf {len(pairs)} pairs the rule passes {passed}.")


if __name__ == "__main__":
    main()
