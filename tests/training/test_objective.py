"""Runs that are trained with UL2's mixture of denoisers."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moeport.comm.single import SingleProcess
from moeport.core.parameters import initial_parameters
from moeport.data.tokenizer import ByteTokenizer
from moeport.errors import ConfigError, UserError
from moeport.model.batch import Batch
from moeport.model.loss_terms import SEQUENCE_NATS
from moeport.studies.compare.figures import read_result
from moeport.training.batches import Batches
from moeport.training.generate import generate_texts
from moeport.training.metrics import read_metrics
from moeport.training.objective_losses import SequenceNats, losses_by_denoiser
from moeport.training.resumable import check_resumable
from moeport.training.run import train
from moeport.training.sampling import Sampling
from moeport.training.task import build_task
from tests.conformance.targets import TOLERANCE, Target, parameters
from tests.support import assert_close
from tests.training.test_resumable import checkpoint_of
from tests.training.test_run import contents, last, stop_after
from tests.training.tiny import tiny_config

QUIET = Console(quiet=True)
UL2 = {"objective": {"name": "ul2", "steps": 4}}
ROWS = 268


def config_of(folder, data=UL2, rows=ROWS, **sections):
    return tiny_config(folder, data=data, model={"vocab_size": rows}, **sections)


def task_of(folder, **training):
    return build_task(config_of(folder, training={"batch_size": 8, **training}), report=lambda _: None)


def batches_of(task, rank=0, size=1) -> Batches:
    world: Any = SimpleNamespace(rank=rank, size=size)
    return Batches(task.config.training, task.model(), task.train, world, task.first_token, task.denoising)


@pytest.mark.parametrize(("ranks", "parts"), [(1, 4), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_cut_what_one_rank_draws(tmp_path, ranks, parts):
    (whole,) = batches_of(task_of(tmp_path)).of_step(2)
    task = task_of(tmp_path, gradient_accumulation=parts)
    cut = [batch for rank in range(ranks) for batch in batches_of(task, rank, ranks).of_step(2)]
    assert len(cut) == ranks * parts
    for name in ("token_BS", "target_BS", "weight_BS"):
        np.testing.assert_array_equal(np.concatenate([getattr(batch, name) for batch in cut]), getattr(whole, name))
    assert whole.weight_BS.mean(dtype=np.float64) == pytest.approx(1, rel=1e-6)


def test_after_the_mixture_a_step_is_that_of_a_causal_run(tmp_path):
    task, causal = task_of(tmp_path), build_task(tiny_config(tmp_path, training={"batch_size": 8}), report=print)
    assert next(batches_of(task).of_step(3)).weight_BS is not None
    (mixed,), (plain,) = batches_of(task).of_step(4), batches_of(causal).of_step(4)
    assert mixed.weight_BS is None
    np.testing.assert_array_equal(mixed.token_BS, plain.token_BS)
    np.testing.assert_array_equal(mixed.target_BS, plain.target_BS)


EXACT = [
    Target("numpy", "cpu", "float64"),
    Target("torch", "cpu", "float64"),
    Target("mindspore", "cpu", "float64"),
    Target("mindspore", "cpu", "float64", static=True),
]


@pytest.mark.parametrize("target", parameters(EXACT))
def test_the_loss_of_a_batch_is_the_mean_over_what_counts(tmp_path, target):
    task, backend = task_of(tmp_path), target.build()
    (batch,) = batches_of(task).of_step(2)
    lm = task.model()
    model = backend.evaluation_model(lm, initial_parameters(lm.parameter_specs(), 0))
    terms = model.evaluate(batch)
    got = float(backend.ops.to_numpy(terms.cross_entropy))
    nats_BS = model.token_losses(Batch(batch.token_BS, batch.target_BS))
    counted = [nats for nats, weight in zip(nats_BS.ravel(), batch.weight_BS.ravel(), strict=True) if weight]
    assert len(counted) < 0.75 * nats_BS.size
    assert_close(got, np.mean(counted), TOLERANCE["float32"])
    (own_B,) = backend.ops.to_numpy(terms.measured[SEQUENCE_NATS])
    assert_close(own_B, (nats_BS * batch.weight_BS).sum(1), TOLERANCE["float32"])


def test_a_run_resumes_exactly_and_says_what_each_denoiser_loses(tmp_path):
    config = config_of(tmp_path, metrics={"report": True})
    train(config, console=QUIET)
    steps, evaluations = read_metrics(config.run.dir / "metrics.jsonl")
    losses = [each.val_loss_by_objective for each in evaluations]
    task = build_task(config, report=lambda _: None)
    assert [list(each) for each in losses] == [task.denoising.names] * 2
    assert [step.loss for step in steps] == pytest.approx([np.log(ROWS)] * 6, rel=0.3)
    assert task.describe().endswith("; rearranged by 6 denoisers in the first 4 steps")
    page = (config.run.dir / "report.html").read_text()
    assert "Validation loss by denoiser" in page
    assert all(f"{loss:.4f}" in page for loss in losses[-1].values())
    figures = read_result(config.run.dir, config, 1).figures.values()
    assert {name: figures[f"val_loss.{name}"] for name in losses[-1]} == losses[-1]
    whole = contents(last(config))
    for step in (2, 5):
        stop_after(config, step)
        train(config, resume=True, console=QUIET)
        assert contents(last(config)) == whole
    (text,) = generate_texts(config.run.dir, ["def "], Sampling(max_tokens=8))
    assert text.text


def of_step(task, step):
    """For each denoiser, its mean loss in a step of the initial weights, by a loop over targets; and its targets."""
    lm = task.model()
    model = (
        Target("torch", "cpu", "float64")
        .build()
        .evaluation_model(lm, initial_parameters(lm.parameter_specs(), task.config.training.seed))
    )
    parts = [*batches_of(task).of_step(step)]
    nats = [row for part in parts for row in model.token_losses(Batch(part.token_BS, part.target_BS))]
    weights = [row for part in parts for row in part.weight_BS]
    found = {}
    for number, nats_S, weight_S in zip(task.denoising.chosen(step, len(nats)), nats, weights, strict=True):
        counted = [nats for nats, weight in zip(nats_S, weight_S, strict=True) if weight]
        found.setdefault(task.denoising.names[number], []).extend(counted)
    return {name: (np.mean(all_nats), len(all_nats)) for name, all_nats in found.items()}


@pytest.mark.parametrize("parts", [1, 4])
def test_each_step_says_what_its_denoisers_lose(tmp_path, parts):
    training = {"batch_size": 8, "gradient_accumulation": parts, "evaluation_interval": 0}
    config = config_of(tmp_path, training=training, metrics={"report": True})
    train(config, console=QUIET)
    steps, _ = read_metrics(config.run.dir / "metrics.jsonl")
    task = build_task(config, report=lambda _: None)
    by_step = [step.loss_by_objective for step in steps]
    expected = of_step(task, 0)
    assert by_step[0] == pytest.approx({name: loss for name, (loss, _) in expected.items()}, rel=1e-4)
    assert by_step[4:] == [None, None]
    for number, step in enumerate(steps[:4]):
        targets = {name: count for name, (_, count) in of_step(task, number).items()}
        assert sorted(targets) == sorted(step.loss_by_objective)
        mean = np.average([step.loss_by_objective[name] for name in targets], weights=[*targets.values()])
        assert step.loss == pytest.approx(mean, rel=1e-5)
    page = (config.run.dir / "report.html").read_text()
    assert 'aria-label="Training loss over steps"' in page
    assert all(f'data-run="{name}"' in page for found in by_step[:4] for name in found)


def test_losses_of_denoisers_are_means_over_ranks_and_passes():
    ops = Target("numpy", "cpu", "float64").build().ops
    parts = [
        [SequenceNats(np.array([[6.0, 3.0], [2.0, 1.0]]), np.array([2.0, 1.0]), np.array([0, 2]))],
        [],
        [SequenceNats(np.array([[1.0]]), np.array([4.0]), np.array([2])) for _ in range(2)],
    ]
    world: Any = SingleProcess(ops)
    found = losses_by_denoiser(world, ["a", "b", "c"], parts)
    assert found == [{"a": 2.0, "c": 2.0}, None, {"c": 0.25}]
    world.sum_of_numbers = lambda values: values * 2  # another rank with the same
    assert losses_by_denoiser(world, ["a", "b", "c"], parts) == found
    assert losses_by_denoiser(world, ["a"], [[], []]) == [None, None]


class ByPosition:
    """A model whose loss at a position is that position, whatever it reads."""

    def token_losses(self, batch):
        return np.broadcast_to(np.arange(batch.token_BS.shape[1], dtype=np.float64), batch.token_BS.shape)


def test_the_loss_of_a_denoiser_is_the_mean_over_its_targets(tmp_path):
    task = task_of(tmp_path)
    model: Any = ByPosition()
    found = task.loss_by_objective(SingleProcess(Target("numpy", "cpu", "float64").build().ops), model, 3)
    sums = dict.fromkeys(task.denoising.names, (0.0, 0))
    windows = ((0, window) for window in task.validation.windows(5))
    for _, (_, _, weight_BS), number_B in task.denoising.held_out(windows):
        for row, number in enumerate(number_B):
            for position in range(weight_BS.shape[1]):
                if weight_BS[row, position]:
                    nats, targets = sums[task.denoising.names[number]]
                    sums[task.denoising.names[number]] = nats + position, targets + 1
    assert found == pytest.approx({name: nats / targets for name, (nats, targets) in sums.items()})


def test_causal_runs_have_no_such_losses(tmp_path):
    config = tiny_config(tmp_path, training={"steps": 1})
    train(config, console=QUIET)
    assert "loss_by_objective" not in (config.run.dir / "metrics.jsonl").read_text()
    assert json.loads((config.run.dir / "metrics.jsonl").read_text().splitlines()[-1])["val_loss"] > 0


@pytest.mark.parametrize(("before", "now", "refused"), [(4, 3, False), (3, None, False), (2, 3, True), (None, 2, True)])
def test_the_length_of_the_mixture_may_change_in_steps_to_come(tmp_path, before, now, refused):
    was, config = (config_of(tmp_path, {"objective": {"name": "ul2", "steps": n}}) for n in (before, now))
    if not refused:
        (change,) = check_resumable(config, checkpoint_of(was))
        assert change.key == "data.objective.steps"
        return
    with pytest.raises(UserError, match=r"data\.objective\.steps: .*: of the 3 steps that are done, others"):
        check_resumable(config, checkpoint_of(was))


def test_a_tokenizer_whose_size_the_config_does_not_know_is_checked_later(tmp_path):
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    tokenizer = {"name": "file", "path": str(tmp_path / "tokenizer.json")}
    small = config_of(tmp_path, {**UL2, "tokenizer": tokenizer}, rows=ROWS - 8)
    with pytest.raises(
        UserError, match=r"model\.vocab_size: has no room .*\(got 260\); expected at least 264, 257 of them"
    ):
        build_task(small, report=lambda _: None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"document_mask": True}, r"data\.document_mask: hides documents"),
        ({"sequence_length": 7}, r"data\.sequence_length: is too short for the spans"),
        ({"objective": {"name": "ul2", "denoisers": [{"name": "a"}] * 2}}, r"denoisers: has two denoisers of one name"),
        ({"objective": {"steps": 3}}, r"data\.objective\.steps: has no effect while data\.objective\.name is causal"),
        ({"source": {"name": "digits"}}, r"data\.objective\.name: rearranges text"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, data, message):
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, {**UL2, **data})
