"""Comparisons of real, tiny runs."""

import csv
import io
import json
import re
import shutil
import signal
import statistics
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from moeport.config import load_config
from moeport.core.parameters import initial_parameters
from moeport.errors import InterruptedRunError, RunError, UserError
from moeport.model.build import build_model
from moeport.routers import BY_NAME
from moeport.studies.compare.compare import compare
from moeport.studies.compare.export import to_json, write_csv
from moeport.studies.compare.fairness import COMPARED, IDLE
from moeport.studies.compare.figures import all_to_all_bytes, read_result
from moeport.studies.compare.page import write_page
from moeport.studies.compare.plan import plan, shared_parameters
from moeport.studies.compare.plot import write_plot
from moeport.studies.compare.table import explanations, markdown, rows, terminal
from moeport.training.metrics import read_metrics
from moeport.training.run_dir import read_config
from moeport.training.side_files import read_summary
from tests.training.test_report import Page
from tests.training.tiny import tiny_values

pytest.importorskip("torch")
QUIET = Console(quiet=True)
ROUTER_FILES = sorted((Path(__file__).parents[2] / "configs" / "routers").glob("*.yaml"))
MOE = {
    "topk": {},
    "switch": {"router": {"name": "switch"}},
    "tight": {"capacity": {"policy": "factor", "factor": 0.5}},
}
BROKEN = {"router_z_loss": 1e30}
TOKENS, EXPERTS, LAYERS = 4 * 32, 4, 2


def write_configs(folder, moe, **sections):
    """A YAML file for each entry of `moe`."""
    files = []
    for name, values in moe.items():
        path = folder / f"{name}.yaml"
        model = {"moe": values}
        training = {"steps": 4, "evaluation_interval": 2}
        path.write_text(yaml.safe_dump(tiny_values(folder, **{"training": training, **sections, "model": model})))
        files.append(path)
    return files


def planned(folder, moe=MOE, overrides=(), **options):
    return plan(write_configs(folder, moe), folder / "out", overrides, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison of three configs, and its folder."""
    folder = tmp_path_factory.mktemp("compare")
    return compare(planned(folder, overrides=("metrics.report=true",)), ranks=4, console=QUIET), folder


class TestPlan:
    def test_other_data_are_refused_with_config_key_and_both_values(self, tmp_path):
        files = write_configs(tmp_path, {"topk": {}})
        (tmp_path / "more").mkdir()
        files += write_configs(tmp_path / "more", {"switch": {}}, optimizer={"learning_rate": 0.5})
        with pytest.raises(UserError) as error:
            plan(files, tmp_path / "out")
        message = str(error.value)
        assert "\n  switch: optimizer.learning_rate is 0.5, but 0.01 in topk\n" in message
        assert "switch: data.source.paths is ['" in message
        assert "model.moe" not in message.partition("\n")[2]
        assert message.endswith("allow a key to differ with --allow-different KEY")

    def test_a_section_can_be_let_through(self, tmp_path):
        files = write_configs(tmp_path, {"topk": {}})
        (tmp_path / "more").mkdir()
        files += write_configs(tmp_path / "more", {"switch": {}}, optimizer={"learning_rate": 0.5})
        assert plan(files, tmp_path / "out", allowed=["optimizer.learning_rate", "data"]).names == ["topk", "switch"]
        with pytest.raises(UserError, match=r"optimizer\.learning_rate is 0\.5"):
            plan(files, tmp_path / "out", allowed=["optimizer.learning", "data"])

    def test_two_configs_of_one_name_and_an_unknown_baseline_are_refused(self, tmp_path):
        files = write_configs(tmp_path, MOE)
        with pytest.raises(UserError, match=r"two configs are named topk: .*topk.yaml and .*topk.yaml; rename one"):
            plan([*files, files[0]], tmp_path)
        with pytest.raises(UserError, match="--baseline other: no such config; expected one of topk, switch, tight"):
            plan(files, tmp_path, baseline="other")

    def test_the_baseline_is_topk_or_the_first(self, tmp_path):
        files = write_configs(tmp_path, MOE)
        assert plan(files[::-1], tmp_path / "out").baseline == "topk"
        assert plan(files[1:], tmp_path / "out").baseline == "switch"
        assert plan(files, tmp_path / "out", baseline="tight").baseline == "tight"

    def test_differences_name_the_keys_of_the_experts(self, tmp_path):
        found = {str(difference) for difference in planned(tmp_path).differences("switch")}
        assert "model.moe.router.name topk -> switch" in found
        assert "no model.moe.router.top_k" in found
        assert planned(tmp_path).differences("topk") == []

    def test_a_folder_with_a_run_of_another_config_is_refused(self, finished):
        _, folder = finished
        with pytest.raises(
            UserError, match=r"out/topk holds a run of another config: training.batch_size 4 -> 6; choo"
        ):
            planned(folder, overrides=("training.batch_size=6",))

    def test_a_run_whose_schedule_has_ended_cannot_become_longer(self, finished):
        _, folder = finished
        with pytest.raises(
            UserError, match=r"out/topk holds a run of 4 steps: the cosine schedule of 4 steps has the "
        ):
            planned(folder, overrides=("training.steps=6",))
        with pytest.raises(
            UserError, match=r"out/topk holds a run of 4 steps: 4 of them are done, which is more than 2"
        ):
            planned(folder, overrides=("training.steps=2",))

    def test_parameters_said_to_start_equal_do_and_the_others_do_not(self, tmp_path):
        moe = {"topk": {}, "other": {"num_shared_experts": 1, "router": {"name": "adamoe", "top_k": 2}}}
        configs = [load_config(file) for file in write_configs(tmp_path, moe)]
        values = [
            initial_parameters(build_model(config.model, config.data, 257).parameter_specs(), config.training.seed)
            for config in configs
        ]
        baseline, own = values
        equal = {name for name, x in own.items() if name in baseline and x.tobytes() == baseline[name].tobytes()}
        count, total, rest = shared_parameters(configs[1], configs[0], 257)
        assert count == sum(own[name].size for name in equal)
        assert total == sum(x.size for x in own.values())
        assert rest == ["layers.*.moe.router.weight", "layers.*.moe.shared.w_in", "layers.*.moe.shared.w_out"]


class TestComparison:
    def test_figures_are_those_of_the_metrics(self, finished):
        comparison, folder = finished
        for name in MOE:
            figures = comparison.figures(name)[0]
            steps, evaluations = read_metrics(folder / "out" / name / "metrics.jsonl")
            assert figures.val_loss == evaluations[-1].val_loss
            assert figures.drop_rate == pytest.approx(statistics.fmean(s.drop_rate for s in steps[2:]))
            assert figures.imbalance == pytest.approx(statistics.fmean(s.imbalance for s in steps[2:]))
            assert figures.step_time == statistics.median(s.step_time for s in steps)
            assert figures.rows_total == sum(s.rows_computed for s in steps)
            assert figures.train_time == pytest.approx(sum(s.step_time for s in steps))
            assert figures.val_loss_by_frequency == evaluations[-1].val_loss_by_frequency
            assert evaluations[0].val_loss_by_frequency is None

    def test_flops_are_those_of_the_rows_that_were_computed(self, finished):
        comparison, folder = finished
        topk, switch, tight = (comparison.figures(name)[0] for name in MOE)
        summary = read_summary(folder / "out/topk")
        assert topk.flops_per_token == pytest.approx(summary.training_flops_per_token)
        assert topk.parameters_active == pytest.approx(summary.parameters_active)
        config = comparison.plan.config("topk").model
        expert = 3 * config.d_model * config.moe.expert_hidden
        assert topk.expert_flops_per_token == pytest.approx(LAYERS * 2 * 6 * expert)
        assert switch.expert_flops_per_token == pytest.approx(LAYERS * 6 * expert)
        assert tight.expert_flops_per_token == pytest.approx(tight.rows_per_token * 6 * expert)
        assert topk.flops_per_token - tight.flops_per_token == pytest.approx(
            topk.expert_flops_per_token - tight.expert_flops_per_token
        )
        assert tight.parameters_active == pytest.approx(
            topk.parameters_active - (LAYERS * 2 - tight.rows_per_token) * expert
        )
        for each in (topk, tight):
            curve = comparison.of("tight" if each is tight else "topk")[0].result.curves["loss_over_flops"]
            assert curve.x[-1] == each.flops_total
            apart = 4 * TOKENS * (each.flops_per_token - each.expert_flops_per_token)
            assert each.flops_total == pytest.approx(apart + each.rows_total * 6 * expert)

    def test_curves_over_rows_and_time(self, finished):
        comparison, folder = finished
        steps, _ = read_metrics(folder / "out/topk/metrics.jsonl")
        curves = comparison.of("topk")[0].result.curves
        rows = [sum(s.rows_computed for s in steps[:n]) for n in (2, 4)]
        assert curves["loss_over_rows"].x.tolist() == rows
        assert curves["loss_over_time"].x.tolist() == pytest.approx(
            [sum(s.step_time for s in steps[:n]) for n in (2, 4)]
        )

    def test_csv_and_plot(self, finished, tmp_path):
        comparison, _ = finished
        write_csv(tmp_path / "a.csv", comparison)
        with (tmp_path / "a.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert [(line["name"], line["seed"], line["chosen"]) for line in lines] == [(name, "0", "1") for name in MOE]
        figures = comparison.figures("switch")[0].values()
        assert float(lines[1]["val_loss.rare"]) == figures["val_loss.rare"]
        assert float(lines[1]["rows_total"]) == figures["rows_total"]
        pytest.importorskip("matplotlib")
        write_plot(tmp_path / "a.svg", comparison)
        assert (tmp_path / "a.svg").read_text().count("switch") >= 1

    def test_rows_follow_from_the_choices_and_the_capacity(self, finished):
        comparison, _ = finished
        topk, switch, tight = (comparison.figures(name)[0] for name in MOE)
        assert topk.rows_mean == pytest.approx(TOKENS * 2 / EXPERTS)
        assert switch.rows_mean == pytest.approx(TOKENS / EXPERTS)
        assert topk.rows_max == pytest.approx(topk.rows_mean * topk.imbalance, rel=1e-3)
        assert tight.drop_rate >= 0.5
        assert tight.rows_mean == pytest.approx(TOKENS * 2 / EXPERTS * (1 - tight.drop_rate), rel=1e-4)
        assert tight.rows_max == TOKENS * 2 / EXPERTS * 0.5

    def test_rows_that_fill_a_tile_are_computed_and_sent(self, finished, tmp_path):
        comparison, folder = finished
        run = folder / "out" / "topk"
        for file in (run / "summary.json", run / "metrics.jsonl"):
            text = file.read_text(encoding="utf-8").replace('"imbalance":', '"fill_rate": 0.25, "imbalance":')
            text = re.sub(r'"rows_computed":\d+,', "", text)  # as in metrics of older versions
            (tmp_path / file.name).write_text(text, encoding="utf-8")
        plain, filled = comparison.figures("topk")[0], read_result(tmp_path, read_config(run), comparison.ranks).figures
        assert filled.rows_mean == pytest.approx(1.25 * plain.rows_mean)
        assert filled.all_to_all_bytes == pytest.approx(1.25 * plain.all_to_all_bytes)

    def test_bytes_of_the_all_to_all(self, finished):
        comparison, _ = finished
        assert comparison.figures("topk")[0].all_to_all_bytes == pytest.approx(LAYERS * 2 * 3 / 4 * 16 * 4 * 2 * 2)
        assert all_to_all_bytes(6.0, 128, "bfloat16", ranks=8) == 6 * 7 / 8 * 128 * 2 * 4
        assert all_to_all_bytes(6.0, 128, "float32", ranks=1) == 0

    def test_each_run_is_an_ordinary_one_with_one_checkpoint(self, finished):
        _, folder = finished
        for name in MOE:
            run = folder / "out" / name
            assert {"report.html", "summary.json", "metrics.jsonl", "config.yaml"} <= {p.name for p in run.iterdir()}
            assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000004"]

    def test_a_finished_run_is_not_trained_again(self, finished):
        comparison, folder = finished
        before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*") if path.is_file()}
        again = compare(planned(folder, overrides=("metrics.report=true",)), ranks=4, console=QUIET)
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert to_json(again) == to_json(comparison)

    def test_json(self, finished):
        comparison, folder = finished
        values = json.loads(json.dumps(to_json(comparison)))
        assert [config["name"] for config in values["configs"]] == list(MOE)
        switch = values["configs"][1]
        assert switch["differences"]["model.moe.router.name"] == {"baseline": "topk", "value": "switch"}
        assert switch["runs"] == [
            {
                "seed": 0,
                "run_dir": str(folder / "out" / "switch"),
                "problem": None,
                "figures": comparison.figures("switch")[0].values(),
            }
        ]
        assert switch["mean"] == {
            key: value for key, value in switch["runs"][0]["figures"].items() if value is not None
        }
        assert set(switch["deviation"].values()) == {None}
        own, base = comparison.figures("switch")[0], comparison.figures("topk")[0]
        difference = switch["to_baseline"]["val_loss"]["difference"]
        assert difference["mean"] == own.val_loss - base.val_loss
        assert (difference["low"], difference["verdict"]) == (None, "one seed")

    def test_markdown(self, finished):
        comparison, _ = finished
        lines = markdown(comparison).splitlines()
        own, base = comparison.figures("switch")[0], comparison.figures("topk")[0]
        cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
        assert cells[0] == "`switch`"
        assert cells[2:4] == [f"{own.val_loss:.4f}", f"{own.val_loss - base.val_loss:+.4f}"]
        assert cells[-2:] == [f"{own.step_time / base.step_time:.2f}", f"{own.all_to_all_bytes:,.0f}"]
        assert lines[2].startswith("| **`topk`** |")
        assert {line.count("|") for line in lines[:5]} == {21}
        text = " ".join(line.strip() for line in lines)
        assert "- All-to-all is computed, not measured: rows per token x (1 - 1/N) x d_model x bytes" in text
        assert text.endswith("N = 4 ranks.")
        assert max(len(line) for line in lines[5:]) <= 120

    def test_terminal_cuts_no_figure(self, finished):
        comparison, _ = finished
        console = Console(width=40, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(terminal(comparison), crop=False)
        text = console.export_text()
        for row in rows(comparison):
            assert all(cell in text for cell in (row.name, row.parameters, *row.cells))

    def test_page(self, finished):
        comparison, folder = finished
        text = write_page(comparison, folder / "out").read_text()
        page = Page(text)
        titles = ["Drop rate", "Expert imbalance", "Rows of the busiest expert", "Rows per expert"]
        titles = 3 * ["Validation loss at the end, mean ± standard deviation"] + 4 * ["Validation loss"] + titles
        assert re.findall(r"<figcaption><b>([^<]+)", text) == titles
        for row in rows(comparison):
            assert set(row.cells) <= set(page.texts["td"])
        links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
        assert links == [f"{name}/report.html" for name in MOE]
        assert all((folder / "out" / link).is_file() for link in links)
        drawn = json.loads(page.texts["script"][0])
        _, evaluations = read_metrics(folder / "out" / "topk" / "metrics.jsonl")
        figures = comparison.figures("topk")[0]
        assert drawn[0]["points"] == [f"rows per token {figures.rows_per_token:.3f}"]
        drawn = json.loads(page.texts["script"][3])
        assert drawn[0]["values"] == [f"{e.val_loss:.4f}" for e in evaluations]
        assert drawn[0]["points"] == ["step 2", "step 4"]
        assert not [value for _, name, value in page.attributes if name == "src" or "http" in (value or "")]


class Trigger(io.StringIO):
    """Takes what is printed; raises SIGINT when a line comes for the second time."""

    def __init__(self, text):
        super().__init__()
        self.text, self.seen = text, 0

    def write(self, text):
        if text.startswith(self.text):
            self.seen += 1
            if self.seen == 2:
                signal.raise_signal(signal.SIGINT)
        return len(text)


def test_an_interrupted_comparison_goes_on_where_it_was(tmp_path, finished):
    stopped = compare(planned(tmp_path), console=Console(file=Trigger("step: 1/"), width=200))
    assert [outcome.problem for outcome in stopped.outcomes] == ["", "not trained yet", "not trained yet"]
    with pytest.raises(
        InterruptedRunError, match=r"^stopped in run 2 of 3, switch; .* Repeat the command to continue$"
    ):
        stopped.raise_for_problems()
    assert "not trained yet" in write_page(stopped, tmp_path).read_text()
    half = len((tmp_path / "out/switch/metrics.jsonl").read_text().splitlines())
    assert half < 6
    resumed = compare(planned(tmp_path), console=QUIET)
    resumed.raise_for_problems()
    whole, _ = finished
    for name in MOE:
        assert resumed.figures(name)[0].val_loss == whole.figures(name)[0].val_loss


def test_a_failing_run_is_reported_and_the_others_go_on(tmp_path):
    moe = {"topk": {}, "broken": BROKEN, "switch": MOE["switch"]}
    comparison = compare(planned(tmp_path, moe), console=QUIET)
    assert [bool(outcome.result) for outcome in comparison.outcomes] == [True, False, True]
    reason = comparison.outcomes[1].problem
    assert re.match(r"NonFiniteError: step 1: .* is not finite", reason)
    assert f"- `broken`: {reason}" in " ".join(line.strip() for line in markdown(comparison).splitlines())
    assert reason in Page(write_page(comparison, tmp_path).read_text()).texts["td"]
    assert to_json(comparison)["configs"][1]["mean"] == {}
    with pytest.raises(RunError, match=r"1 of 3 runs failed:\n  \S+out/broken: NonFiniteError") as error:
        comparison.raise_for_problems()
    assert error.value.exit_code == 1


def test_a_comparison_without_its_baseline_has_no_differences(tmp_path):
    comparison = compare(planned(tmp_path, {"topk": BROKEN, "switch": MOE["switch"]}), console=QUIET)
    lines = markdown(comparison).splitlines()
    assert lines[2].count(" - |") == 18
    assert lines[3].count(" - |") == 4


def test_seeds_give_mean_and_deviation_and_paired_differences(tmp_path):
    moe = {name: MOE[name] for name in ("topk", "switch")}
    compare(planned(tmp_path, moe), console=QUIET)
    first = (tmp_path / "out/topk/metrics.jsonl").stat().st_mtime_ns
    comparison = compare(planned(tmp_path, moe, seeds=[0, 7]), console=QUIET)
    assert (tmp_path / "out/topk/metrics.jsonl").stat().st_mtime_ns == first
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"topk", "topk-seed-7", "switch", "switch-seed-7"}
    own, base = comparison.figures("switch"), comparison.figures("topk")
    assert set(own) == {0, 7}
    losses = [own[seed].val_loss for seed in (0, 7)]
    differences = [own[seed].val_loss - base[seed].val_loss for seed in (0, 7)]
    cells = rows(comparison)[1].cells
    assert cells[0] == f"{statistics.fmean(losses):.4f} ± {statistics.stdev(losses):.4f}"
    mean, half = statistics.fmean(differences), 12.7062 * statistics.stdev(differences) / 2**0.5
    low, high = mean - half, mean + half
    assert cells[1] == f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]{' ~' if low < 0 < high else ''}"
    assert to_json(comparison)["configs"][1]["deviation"]["val_loss"] == statistics.stdev(losses)
    assert 'class="band"' in write_page(comparison, tmp_path).read_text()


def test_a_comparison_becomes_longer(tmp_path):
    moe = {"topk": MOE["topk"]}
    constant = "optimizer.schedule={name: constant}"
    compare(planned(tmp_path, moe, [constant, "training.steps=3"]), console=QUIET)
    longer = compare(planned(tmp_path, moe, [constant], seeds=[0, 7]), console=QUIET)
    whole = compare(plan([tmp_path / "topk.yaml"], tmp_path / "whole", [constant]), console=QUIET)
    assert longer.figures("topk")[0].val_loss == whole.figures("topk")[0].val_loss
    assert len((tmp_path / "out/topk/metrics.jsonl").read_text().splitlines()) == 7
    assert _evaluated(longer) == [["step 2", "step 4"]] * 2
    page = write_page(longer, tmp_path).read_text()
    _lose_evaluation(tmp_path / "out/topk-seed-7/metrics.jsonl", 2)
    lost = compare(planned(tmp_path, moe, [constant], seeds=[0, 7]), console=QUIET)
    assert _evaluated(lost) == [["step 2", "step 4"], ["step 4"]]
    assert "step 2" in page
    assert "step 2" not in write_page(lost, tmp_path).read_text().partition("Over the steps")[0]


def _evaluated(comparison):
    return [outcome.result.curves["val_loss"].points for outcome in comparison.outcomes]


def _lose_evaluation(path, step):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(f'{{"step":{step},"val_loss"')))


def test_runs_on_data_that_have_changed_are_no_results(tmp_path):
    files = write_configs(tmp_path, {"topk": {}})
    compare(plan(files, tmp_path / "out"), console=QUIET)
    (tmp_path / "text/0.txt").write_text("something else\n" * 50)
    files += write_configs(tmp_path, {"switch": MOE["switch"]})
    comparison = compare(plan(files, tmp_path / "out"), console=QUIET)
    assert comparison.outcomes[0].result
    assert comparison.outcomes[1].problem == (
        f"trained on other data than {tmp_path / 'out' / 'topk'}; delete one of the two and repeat the command"
    )


def test_runs_of_different_versions_or_ranks_are_noted(tmp_path, finished):
    _, folder = finished
    shutil.copytree(folder / "out", tmp_path / "out")
    summary = tmp_path / "out/switch/summary.json"
    values = json.loads(summary.read_text())
    values["versions"]["moeport"] = "0.0.1"
    summary.write_text(json.dumps(values))
    files = [folder / f"{name}.yaml" for name in MOE]
    comparison = compare(plan(files, tmp_path / "out"), console=QUIET)
    (note,) = comparison.notes()
    assert note.startswith("The runs had different versions: ")
    assert "moeport 0.0.1" in note
    assert note in explanations(comparison)
    starts = tmp_path / "out/switch/starts.jsonl"
    starts.write_text(json.dumps(json.loads(starts.read_text()) | {"ranks": 4}))
    shutil.copy(folder / "out/switch/summary.json", summary)
    assert compare(plan(files, tmp_path / "out"), console=QUIET).notes() == [
        "The runs had different numbers of ranks: 1; 4."
    ]


def test_images_have_an_accuracy_and_no_bits_per_byte(tmp_path):
    pytest.importorskip("sklearn")
    moe = {"topk": {"num_experts": 4, "expert_hidden": 16}, "soft": {"num_experts": 4, "router": {"name": "soft"}}}
    files = []
    for name, values in moe.items():
        config = {
            "model": {"num_layers": 1, "d_model": 16, "attention": {"num_heads": 2}, "moe": values},
            "data": {"source": {"name": "digits"}},
            "training": {"steps": 2, "batch_size": 8},
            "metrics": {"tensorboard": False, "report": False, "peak_tflops": 1.0},
            "backend": {"device": "cpu"},
        }
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(config))
    comparison = compare(plan(files, tmp_path / "out"), console=QUIET)
    comparison.raise_for_problems()
    figures = comparison.figures("soft")[0]
    lines = markdown(comparison).splitlines()
    assert " accuracy " in lines[0]
    assert "bits/byte" not in lines[0]
    assert f" {figures.val_accuracy:.2%} " in lines[3]
    assert "nats per image" in explanations(comparison)[0]


class TestRouterFiles:
    def test_all_are_equal_but_for_the_experts(self):
        configs = {path.stem: load_config(path).model_dump(mode="json", exclude={"run"}) for path in ROUTER_FILES}
        for config in configs.values():
            del config["model"]["moe"]
        assert all(config == configs["topk"] for config in configs.values()), [
            name for name, config in configs.items() if config != configs["topk"]
        ]

    def test_they_make_a_plan(self, tmp_path):
        assert plan(ROUTER_FILES, tmp_path).baseline == "topk"
        assert COMPARED == ("model.moe",)
        assert "data" not in IDLE

    def test_every_router_that_is_fit_for_language_models_has_one(self):
        wanted = {name for name, router in BY_NAME.items() if not router.config_class.looks_ahead}
        assert wanted <= {path.stem for path in ROUTER_FILES}
