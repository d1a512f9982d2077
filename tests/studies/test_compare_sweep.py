"""Sweeps of a comparison, and its intervals over seeds, on runs that are made up."""

import io
import json
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from moeport.errors import InterruptedRunError, NonFiniteError, RunError, UserError
from moeport.studies.compare.compare import compare, train_here
from moeport.studies.compare.export import to_json
from moeport.studies.compare.outcome import DIVERGED_FILE
from moeport.studies.compare.plan import plan
from moeport.studies.compare.spread import paired
from moeport.studies.compare.table import explanations, markdown
from tests.studies.test_compare import MOE, write_configs

QUIET = Console(quiet=True)
RATE = "optimizer.learning_rate"
PAIR = {name: MOE[name] for name in ("topk", "switch")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run folder, which the made-up ones are copies of."""
    folder = tmp_path_factory.mktemp("whole")
    made = plan(write_configs(folder, {"topk": {}}), folder / "out")
    train_here(made.runs[0], QUIET)
    return made.runs[0].dir


@pytest.fixture
def made_up(whole):
    """A way to train whose losses come from a table by (name, value, seed); `trained` lists the runs in order."""
    losses, trained = {}, []

    def train(run, console):
        key = (run.name, run.value, run.seed)
        trained.append(key)
        loss = losses.get(key, 3.0)
        if isinstance(loss, Exception):
            run.dir.mkdir(parents=True, exist_ok=True)
            raise loss
        shutil.copytree(whole, run.dir, dirs_exist_ok=True)
        (run.dir / "config.yaml").unlink()
        summary = run.dir / "summary.json"
        summary.write_text(json.dumps(json.loads(summary.read_text()) | {"val_loss": loss, "wall_time": 10.0}))

    return SimpleNamespace(train=train, losses=losses, trained=trained)


def swept(folder, *, sweep=f"{RATE}=0.005,1e-2,2e-2", **options):
    return plan(write_configs(folder, PAIR), folder / "out", sweeps=[sweep] if sweep else [], **options)


class TestIntervals:
    @pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (3, 4.30265), (5, 2.77645), (31, 2.04227)])
    def test_they_are_student_s(self, n, t):
        values = [0.1 * (i % 3) - 0.05 + 0.01 * i for i in range(n)]
        mean = sum(values) / n
        deviation = math.sqrt(sum((x - mean) ** 2 for x in values) / (n - 1))
        found = paired(values)
        assert found.high - found.mean == pytest.approx(t * deviation / math.sqrt(n), rel=1e-5)
        assert found.mean - found.low == pytest.approx(found.high - found.mean)

    def test_three_seeds_must_agree_closely(self):
        assert paired([-0.02, -0.03, -0.01]).verdict == "not resolved"
        assert paired([-0.02, -0.025, -0.022]).verdict == "lower"
        assert paired([0.02, 0.025, 0.022]).verdict == "higher"
        assert paired([0.8, 0.81, 0.79], neutral=1.0).verdict == "lower"
        assert paired([-9.0]).verdict == "one seed"


class TestSweep:
    def test_the_best_of_the_first_seed_is_trained_with_the_others(self, tmp_path, made_up):
        made_up.losses |= {("topk", "0.005", 0): 2.0, ("switch", "0.02", 0): 1.0, ("switch", "0.02", 1): 1.5}
        comparison = compare(swept(tmp_path, seeds=[0, 1]), console=QUIET, train_run=made_up.train)
        assert comparison.choices == {"topk": "0.005", "switch": "0.02"}
        assert made_up.trained == [
            *(("topk", value, 0) for value in ("0.005", "0.01", "0.02")),
            ("topk", "0.005", 1),
            *(("switch", value, 0) for value in ("0.005", "0.01", "0.02")),
            ("switch", "0.02", 1),
        ]
        assert {seed: each.val_loss for seed, each in comparison.figures("switch").items()} == {0: 1.0, 1: 1.5}
        folders = {path.name for path in (tmp_path / "out").iterdir()}
        assert {"topk", "topk-learning_rate-0.005", "switch-learning_rate-0.02-seed-1"} <= folders
        text = " ".join(explanations(comparison))
        assert f"switch: {RATE} 0.02 of 0.005: 3.0000, 0.01: 3.0000, 0.02: 1.0000." in text
        assert "lowest validation loss on seed 0, which also counts in the figures" in text
        assert f"switch is best at {RATE} 0.02, the greatest value tried" in text
        found = to_json(comparison)["configs"][1]["sweep"]
        assert (found["key"], found["chosen"], found["chosen_on"]) == (RATE, "0.02", "first")

    def test_the_best_mean_of_all_seeds(self, tmp_path, made_up):
        made_up.losses |= {("topk", "0.005", 0): 2.0, ("topk", "0.005", 1): 9.0, ("topk", "0.01", 1): 2.5}
        comparison = compare(swept(tmp_path, seeds=[0, 1], chosen_on="all"), console=QUIET, train_run=made_up.train)
        assert comparison.choices["topk"] == "0.01"
        assert len(made_up.trained) == 12
        assert "lowest mean validation loss over all seeds" in " ".join(explanations(comparison))

    def test_a_value_that_diverges_is_out_and_not_tried_again(self, tmp_path, made_up):
        made_up.losses[("topk", "0.02", 0)] = NonFiniteError("step 2: the loss is not finite")
        comparison = compare(swept(tmp_path, seeds=[0, 1]), console=QUIET, train_run=made_up.train)
        comparison.raise_for_problems()
        assert comparison.choices["topk"] == "0.005"
        assert "0.02: diverged" in " ".join(explanations(comparison))
        made_up.trained.clear()
        again = compare(swept(tmp_path, seeds=[0, 1]), console=QUIET, train_run=made_up.train)
        assert made_up.trained == []
        assert again.choices == comparison.choices
        (tmp_path / "out/topk-learning_rate-0.02" / DIVERGED_FILE).unlink()
        compare(swept(tmp_path, seeds=[0, 1]), console=QUIET, train_run=made_up.train)
        assert made_up.trained == [("topk", "0.02", 0)]

    def test_nothing_is_chosen_while_a_value_has_failed_otherwise(self, tmp_path, made_up):
        made_up.losses[("topk", "0.02", 0)] = OSError("no space")
        comparison = compare(swept(tmp_path, seeds=[0, 1]), console=QUIET, train_run=made_up.train)
        assert "topk" not in comparison.choices
        assert comparison.figures("topk") == {}
        assert f"- `topk`: {RATE} 0.02, seed 0: OSError: no space" in markdown(comparison)
        with pytest.raises(RunError, match="1 of 7 runs failed"):
            comparison.raise_for_problems()

    def test_after_an_interruption_it_goes_on(self, tmp_path, made_up):
        made_up.losses[("switch", "0.01", 0)] = InterruptedRunError("stopped")
        comparison = compare(swept(tmp_path, seeds=[0, 1]), console=QUIET, train_run=made_up.train)
        with pytest.raises(InterruptedRunError, match="stopped in run 6 of 8, switch; "):
            comparison.raise_for_problems()
        made_up.trained.clear()
        made_up.losses.clear()
        compare(swept(tmp_path, seeds=[0, 1]), console=QUIET, train_run=made_up.train).raise_for_problems()
        assert made_up.trained[:2] == [("switch", "0.01", 0), ("switch", "0.02", 0)]

    def test_the_time_left_counts_the_seeds_that_follow(self, tmp_path, made_up):
        console = Console(record=True, width=200, file=io.StringIO())
        compare(swept(tmp_path, seeds=[0, 1]), console=console, train_run=made_up.train)
        lines = [line for line in console.export_text().splitlines() if line.startswith("run ")]
        assert lines[0] == f"run 1 of 8: topk, seed 0, {RATE} 0.005"
        assert lines[1] == f"run 2 of 8: topk, seed 0, {RATE} 0.01, about 1m10s left in total"
        assert lines[7].endswith("about 10s left in total")

    def test_one_config_can_sweep_a_key_of_its_own(self, tmp_path):
        key = "model.moe.load_balance.coefficient"
        made = plan(write_configs(tmp_path, PAIR), tmp_path / "out", sweeps=[f"switch:{key}=0.01,0.1"])
        assert made.values("topk") == [""]
        assert made.values("switch") == ["0.01", "0.1"]
        assert [each.key for each in made.differences("switch")].count(key) == 0

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (RATE, "not a key with its values; expected KEY=VALUE"),
            (f"{RATE}=1,,2", "not a key with its values"),
            (f"swich:{RATE}=1,2", "no config is named 'swich'; expected one of topk, switch; did you mean switch"),
            ("training.seed=1,2", "training.seed cannot be swept: use --seeds"),
            ("data.sequence_length=1,2", "losses on other data cannot be compared"),
            ("training.skip_steps=[],[]", "is not a key with a single value"),
            ("optimizer.learning_rat=1,2", "learning_rat"),
        ],
    )
    def test_what_cannot_be_swept_is_refused(self, tmp_path, text, message):
        with pytest.raises(UserError, match=re.escape(message)):
            swept(tmp_path, sweep=text)

    def test_two_runs_of_one_folder_are_refused(self, tmp_path):
        files = write_configs(tmp_path, {"a": {}, "a-seed-1": {}})
        with pytest.raises(UserError, match="a and a-seed-1 would both train in "):
            plan(files, tmp_path / "out", seeds=[0, 1])


def test_a_run_without_an_interval_saves_itself_all_the_same(tmp_path):
    made = plan(write_configs(tmp_path, PAIR), tmp_path / "out", ["checkpoint.interval=0", "training.steps=90"])
    assert {run.config.checkpoint.interval for run in made.runs} == {5}
    assert replace(made, baseline="switch").differences("topk")
