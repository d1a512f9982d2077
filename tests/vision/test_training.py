"""`moeport train` on images."""

import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console

import moeport
from moeport.backends import get_backend
from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.comm.single import SingleProcess
from moeport.config.training import BackendConfig
from moeport.data import read_images
from moeport.errors import CheckpointError, UserError
from moeport.model.build import build_model
from moeport.training.checkpoint import list_checkpoints
from moeport.training.evaluate import evaluate_images
from moeport.training.generate import generate
from moeport.training.metrics import EvaluationMetrics, read_metrics
from moeport.training.metrics_table import scalars
from moeport.training.run import train
from moeport.training.summary import DryRun
from tests.optional import installed
from tests.training.whole import load_checkpoint
from tests.vision.tiny import digits_config

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not installed("sklearn"), reason="scikit-learn, which has the digits, is not installed")
QUIET = Console(quiet=True)


def records(config):
    return [json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]


def losses(config):
    return [record["total_loss"] for record in records(config) if "total_loss" in record]


def last(config):
    return list_checkpoints(config.run.dir / "checkpoints")[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few seconds with a report."""
    config = digits_config(
        tmp_path_factory.mktemp("trained"),
        training={"steps": 150, "batch_size": 64, "evaluation_interval": 50},
        checkpoint={"interval": 0},
        metrics={"tensorboard": False, "report": True, "peak_tflops": 1.0},
    )
    console = Console(record=True, width=100, file=io.StringIO())
    summary = train(config, console=console)
    console.print(summary)
    return config, summary, console.export_text()


def test_it_learns_the_digits(trained):
    _, summary, _ = trained
    assert summary.val_accuracy > 0.9
    assert summary.val_loss < 0.4


def test_summary_metrics_and_text_have_the_accuracy_and_no_bits_per_byte(trained):
    config, summary, text = trained
    evaluations = [record for record in records(config) if "val_loss" in record]
    assert [set(record) for record in evaluations] == [{"step", "val_loss", "val_accuracy"}] * 3
    assert evaluations[-1]["val_accuracy"] == summary.val_accuracy
    assert (summary.val_bits_per_byte, summary.sample, summary.baselines) == (None, None, {})
    assert f"val_accuracy: {summary.val_accuracy:.2%}" in text
    assert "nats per image" in text
    assert "images      1,408 of 4 patches; 389 images held out" in text
    assert "bits per byte" not in text
    assert not (config.run.dir / "tokenizer.json").exists()


def test_the_report_has_the_accuracy_and_no_bits_per_byte(trained):
    config, summary, _ = trained
    page = (config.run.dir / "report.html").read_text().partition("<details")[0]
    assert "Validation accuracy" in page
    assert f"{summary.val_accuracy:.2%}" in page
    assert "nats/image" in page
    assert "nats/token" not in page
    assert "its per byte" not in page


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_accuracy_and_loss_are_those_of_scikit_learn(trained, backend):
    from sklearn.metrics import accuracy_score, log_loss

    config, summary, _ = trained
    held_out = read_images(config.data).validation
    shapes = build_model(config.model, config.data, 0)
    model = get_backend(BackendConfig(name=backend, device="cpu", dtype="float64")).evaluation_model(
        shapes, load_checkpoint(last(config)).model
    )
    result = evaluate_images(SingleProcess(NumpyOps()), model, held_out.windows(100))
    scores = model.logits(held_out.patch_NSP)
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert result.accuracy == accuracy_score(held_out.class_N, shares.argmax(1)) == summary.val_accuracy
    assert result.loss == pytest.approx(log_loss(held_out.class_N, shares), rel=1e-9)
    assert result.loss == pytest.approx(summary.val_loss, rel=1e-4)


def test_evaluations_are_read_back_and_go_to_tensorboard(trained):
    config, summary, _ = trained
    last_evaluation = read_metrics(config.run.dir / "metrics.jsonl")[1][-1]
    assert last_evaluation == EvaluationMetrics(150, summary.val_loss, None, summary.val_accuracy)
    tags = {"validation/loss": summary.val_loss, "validation/accuracy": summary.val_accuracy}
    assert scalars(last_evaluation) == tags


def test_no_text_comes_from_a_classifier(trained):
    config, _, _ = trained
    with pytest.raises(UserError, match=r"was trained to classify images \(data\.source\.name: digits\)"):
        generate(config.run.dir, "7")
    with pytest.raises(UserError, match=r"classify images .* and cannot be evaluated on text; expected"):
        moeport.evaluate(config.run.dir, [str(config.run.dir)])


@pytest.mark.parametrize("router", ["topk", "gshard", "sigmoid_bias", "soft", "expert_choice"])
def test_resume_repeats_the_uninterrupted_run_bit_for_bit(tmp_path, router):
    moe = {"num_experts": 4, "expert_hidden": 16, "router": {"name": router}}
    model = {"num_layers": 2, "d_model": 16, "attention": {"num_heads": 2}, "moe": moe}
    config = digits_config(tmp_path, model=model, training={"steps": 6, "batch_size": 8, "gradient_accumulation": 2})
    train(config, console=QUIET)
    weights, whole = last(config).joinpath("model-00000-of-00001.safetensors").read_bytes(), losses(config)
    stop_after(config, 2)
    train(config, resume=True, console=QUIET)
    assert last(config).joinpath("model-00000-of-00001.safetensors").read_bytes() == weights
    assert losses(config) == whole


def stop_after(config, step):
    for path in list_checkpoints(config.run.dir / "checkpoints"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (config.run.dir / "summary.json").unlink()


def test_other_images_cannot_be_resumed(tmp_path, monkeypatch):
    config = digits_config(tmp_path)
    train(config, console=QUIET)
    stop_after(config, 2)
    with pytest.raises(UserError, match=r"data\.validation_fraction: 0\.2 -> 0\.3"):
        train(digits_config(tmp_path, data={"validation_fraction": 0.3}), resume=True, console=QUIET)
    monkeypatch.setattr("moeport.data.images.patches", lambda pixels, size: np.zeros((len(pixels), 4, 16), np.float32))
    with pytest.raises(CheckpointError, match="was trained on other images than the config's source provides now"):
        train(config, resume=True, console=QUIET)


def test_a_dry_run_counts_patches_as_tokens(tmp_path):
    result = train(digits_config(tmp_path), dry_run=True, console=QUIET)
    assert isinstance(result, DryRun)
    assert result.tokens_per_step == 8 * 4
    assert result.epochs == pytest.approx(6 * 8 / 1408)


@pytest.mark.parametrize("router", ["topk", "expert_choice"])
def test_mindspore_gives_the_curve_of_torch(tmp_path, router):
    pytest.importorskip("mindspore")
    moe = {"num_experts": 4, "expert_hidden": 16, "router": {"name": router}}
    model = {"num_layers": 1, "d_model": 16, "attention": {"num_heads": 2}, "moe": moe}
    configs = [
        digits_config(
            tmp_path / name,
            model=model,
            training={"steps": 12, "batch_size": 8, "evaluation_interval": 0},
            checkpoint={"interval": 0},
            backend={"name": name, "device": "cpu", "dtype": "float64"},
        )
        for name in ("torch", "mindspore")
    ]
    torch, mindspore = (train(config, console=QUIET) for config in configs)
    np.testing.assert_allclose(losses(configs[1]), losses(configs[0]), rtol=1e-6)
    assert mindspore.val_loss == pytest.approx(torch.val_loss, rel=1e-6)
    assert mindspore.val_accuracy == torch.val_accuracy
