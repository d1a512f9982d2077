import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from moeport.errors import CheckpointError, DataError, NonFiniteError, UserError
from moeport.routers import BY_NAME
from moeport.training.checkpoint import list_checkpoints
from moeport.training.run import train
from moeport.training.summary import DryRun
from tests.training.tiny import LINES, TIMED, tiny_config
from tests.training.whole import load_checkpoint

QUIET = Console(quiet=True)


def contents(checkpoint):
    return {file.name: file.read_bytes() for file in checkpoint.glob("*.safetensors")}


def last(config):
    return list_checkpoints(config.run.dir / "checkpoints")[-1]


def stop_after(config, step):
    """Leave the run folder as a kill after the checkpoint of `step` would."""
    for path in list_checkpoints(config.run.dir / "checkpoints"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (config.run.dir / "summary.json").unlink()


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path):
    configs = [
        tiny_config(tmp_path, run={"dir": str(tmp_path / name)}, training={"seed": seed})
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    for config in configs:
        train(config, console=QUIET)
    first, second, other = (contents(last(config)) for config in configs)
    assert first == second
    assert first != other


LATENT = {
    "kind": "mla",
    "num_kv_heads": None,
    "q_lora_rank": 6,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}


@pytest.mark.parametrize("router", BY_NAME)
def test_resume_repeats_the_uninterrupted_run_bit_for_bit(tmp_path, router):
    """One of them with latent attention."""
    moe = {"router": {"name": router}, "allow_future_tokens": True}
    attention = LATENT if router == "sigmoid_bias" else {}
    if not BY_NAME[router].config_class.fixed_load:
        moe["capacity"] = {"policy": "factor", "factor": 1.0}
    config = tiny_config(tmp_path, model={"moe": moe, "attention": attention}, training={"gradient_accumulation": 2})
    train(config, console=QUIET)
    weights, metrics = contents(last(config)), (config.run.dir / "metrics.jsonl").read_text()
    stop_after(config, 2)
    train(config, resume=True, console=QUIET)
    assert contents(last(config)) == weights
    assert [comparable(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()] == [
        comparable(line) for line in metrics.splitlines()
    ]


def comparable(line):
    return {key: value for key, value in json.loads(line).items() if key not in TIMED}


@pytest.mark.parametrize(("given", "prompt"), [(None, LINES[100]), ("x = ", "x = "), ("", "")])
def test_the_sample_continues_the_configs_prompt_or_a_held_out_document(tmp_path, given, prompt):
    metrics = {} if given is None else {"sample_prompt": given}
    summary = train(tiny_config(tmp_path, training={"steps": 1}, metrics=metrics), console=QUIET)
    shown = summary.sample["prompt"]
    assert shown == given if given is not None else prompt.startswith(shown)
    assert len(shown) > 20 or given is not None


@pytest.mark.parametrize("tokens", [0, 3])
def test_the_sample_has_as_many_tokens_as_the_config_says_or_there_is_none(tmp_path, tokens):
    config = tiny_config(tmp_path, training={"steps": 1}, metrics={"sample_tokens": tokens, "report": True})
    summary = train(config, console=QUIET)
    if tokens:
        assert 0 < len(summary.sample["text"]) <= tokens
    else:
        assert summary.sample is None
    assert ("<h2>Sample</h2>" in (config.run.dir / "report.html").read_text()) == bool(tokens)


def test_skipped_files_are_counted_in_log_summary_and_report(tmp_path):
    source = {"paths": [str(tmp_path / "text")], "validation_paths": [], "bad_files": "skip"}
    data = {"source": source, "validation_fraction": 0.5}
    config = tiny_config(tmp_path, training={"steps": 1}, data=data, metrics={"report": True})
    (tmp_path / "text" / "bad.txt").write_bytes(b"\xff")
    console = Console(record=True, width=200, file=io.StringIO())
    summary = train(config, console=console)
    assert summary.skipped == json.loads((config.run.dir / "summary.json").read_text())["skipped"] == 1
    assert "skipped 1 file or row that cannot be read (data.source.bad_files): " in console.export_text()
    assert "files and rows skipped" in (config.run.dir / "report.html").read_text()


def test_training_lowers_the_loss_and_summary_agrees_with_the_metrics(tmp_path):
    config = tiny_config(tmp_path, training={"steps": 40})
    summary = train(config, console=QUIET)
    records = [json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 41))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert {"step", "loss", "lr", "grad_norm", "tokens_per_second"} <= steps[0].keys()
    assert records[-1] == {"step": 40, "val_loss": summary.val_loss, "val_bits_per_byte": summary.val_bits_per_byte}
    assert set(summary.baselines) == {"gzip -9", "xz -9"}
    assert np.sum(steps[0]["expert_load"], axis=1) == pytest.approx([1, 1], abs=1e-3)


def test_bits_per_byte_count_every_byte_of_the_held_out_text(tmp_path):
    config = tiny_config(tmp_path)
    summary = train(config, console=QUIET)
    num_bytes = len((tmp_path / "text/5.txt").read_bytes())
    nats = summary.val_loss * (num_bytes + 1)
    assert summary.val_bits_per_byte == pytest.approx(nats / np.log(2) / num_bytes, rel=1e-12)


def test_gradient_accumulation_of_two_halves_equals_the_whole_batch(tmp_path):
    losses = []
    for parts in (1, 2):
        config = tiny_config(
            tmp_path,
            run={"dir": str(tmp_path / f"run{parts}")},
            model={"output_z_loss": 1e-3, "moe": {"load_balance": {"scope": "sequence"}, "router_z_loss": 1e-3}},
            training={"gradient_accumulation": parts},
        )
        train(config, console=QUIET)
        losses.append(
            [
                json.loads(line)["loss"]
                for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()
                if "grad_norm" in line
            ]
        )
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_a_used_folder_is_refused_and_left_alone(tmp_path):
    config = tiny_config(tmp_path)
    train(config, console=QUIET)
    before = {path: path.read_bytes() for path in config.run.dir.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as error:
        train(config, console=QUIET)
    assert str(error.value) == (
        f"run.dir: {config.run.dir} already holds a run, last checkpoint step-000006; continue it with --resume, "
        "or start another with --set run.dir=FOLDER"
    )
    assert {path: path.read_bytes() for path in config.run.dir.rglob("*") if path.is_file()} == before


def test_resume_of_a_finished_run_returns_its_summary(tmp_path):
    config = tiny_config(tmp_path)
    summary = train(config, resume=True, console=QUIET)
    assert train(config, resume=True, console=QUIET) == summary


def test_resume_refuses_another_model_and_tells_of_other_changes(tmp_path, capsys):
    optimizer = {"schedule": {"name": "constant"}}
    train(tiny_config(tmp_path, optimizer=optimizer), console=QUIET)
    with pytest.raises(UserError, match=r"model\.norm_eps: 1e-05 -> 0\.001; training\.seed: 0 -> 3; restore these"):
        train(tiny_config(tmp_path, model={"norm_eps": 1e-3}, training={"seed": 3, "steps": 8}), resume=True)
    train(tiny_config(tmp_path, training={"steps": 7}, optimizer=optimizer), resume=True)
    assert "changed from step 7 on: training.steps: 6 -> 7" in capsys.readouterr().out


def test_resume_where_the_text_lies_elsewhere(tmp_path):
    sections = {"data": {"source": {"paths": ["*.txt"], "validation_paths": []}, "root": str(tmp_path / "text")}}
    config = tiny_config(tmp_path, **sections)
    train(config, console=QUIET)
    weights = contents(last(config))
    stop_after(config, 2)
    shutil.rmtree(tmp_path / "cache")
    shutil.move(tmp_path / "text", tmp_path / "elsewhere/text")
    (tmp_path / "text").mkdir()
    with pytest.raises(DataError, match="no file matches"):
        train(config, resume=True, console=QUIET)
    sections["data"]["root"] = str(tmp_path / "elsewhere/text")
    train(tiny_config(tmp_path, **sections), resume=True, console=QUIET)
    assert contents(last(config)) == weights


def test_resume_refuses_other_text(tmp_path):
    config = tiny_config(tmp_path)
    train(config, console=QUIET)
    stop_after(config, 3)
    (tmp_path / "text/0.txt").write_text("something else\n" * 50)
    with pytest.raises(CheckpointError, match="was trained on other text"):
        train(config, resume=True, console=QUIET)


def test_dry_run_measures_and_writes_nothing(tmp_path):
    config = tiny_config(tmp_path)
    result = train(config, dry_run=True, console=QUIET)
    assert isinstance(result, DryRun)
    assert result.tokens_per_step == 4 * 32
    assert result.seconds_per_step > 0
    assert not config.run.dir.exists()


def test_a_non_finite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    config = tiny_config(
        tmp_path, optimizer={"learning_rate": 1e30, "schedule": {"name": "constant", "warmup_steps": 0}}
    )
    with pytest.raises(NonFiniteError, match=r"^step 2: gradient of \S+ is not finite \(loss "):
        train(config, console=QUIET)
    kept = load_checkpoint(last(config))
    assert kept.meta.step == 1
    assert all(np.isfinite(value).all() for value in kept.model.values())


def test_the_best_and_the_last_checkpoints_are_kept(tmp_path):
    config = tiny_config(
        tmp_path,
        training={"steps": 12, "evaluation_interval": 4},
        optimizer={"learning_rate": 0.3, "schedule": {"name": "constant", "warmup_steps": 0}},
        checkpoint={"interval": 2, "keep_last": 2},
    )
    train(config, console=QUIET)
    paths = list_checkpoints(config.run.dir / "checkpoints")
    losses = {
        record["step"]: record["val_loss"]
        for record in map(json.loads, (config.run.dir / "metrics.jsonl").read_text().splitlines())
        if "val_loss" in record
    }
    best = min(losses, key=losses.get)
    assert {path.name for path in paths} == {f"step-{step:06d}" for step in {10, 12, best}}


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path):
    (tmp_path / "text").mkdir()
    values = tiny_config(tmp_path.parent / tmp_path.name / "x")
    config = values.model_copy(update={"model": values.model.model_copy(update={"vocab_size": 100})})
    with pytest.raises(UserError, match=r"model\.vocab_size: smaller than the tokenizer's vocabulary \(got 100\)"):
        train(config, console=QUIET)


def test_numpy_refuses_to_train(tmp_path):
    with pytest.raises(UserError, match=r"numpy cannot train; set backend\.name to torch or mindspore"):
        train(tiny_config(tmp_path, backend={"name": "numpy"}), console=QUIET)
