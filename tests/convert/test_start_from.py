"""Runs that start from the weights of another, such as a converted one."""

import io

import numpy as np
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from moeport.cli.main import app
from moeport.errors import UserError
from moeport.training.run import train
from tests.training.tiny import tiny_config, tiny_values
from tests.training.whole import load_checkpoint


def run(folder, name, resume=False, start=None, steps=2, **sections):
    where = {"run": {"dir": str(folder / name)}}
    training = {"steps": steps, "evaluation_interval": 0, "start_from": None if start is None else str(start)}
    return train(
        tiny_config(folder, **where, training=training, **sections), resume=resume, console=Console(quiet=True)
    )


def weights(folder, name, step):
    return load_checkpoint(folder / name / "checkpoints" / f"step-{step:06d}").model


def test_a_run_begins_where_another_ended(tmp_path):
    run(tmp_path, "first", steps=3)
    small = {"learning_rate": 1e-30, "weight_decay": 0.0}
    run(tmp_path, "second", start=tmp_path / "first", steps=1, optimizer=small)
    run(tmp_path, "third", start=tmp_path / "first/checkpoints/step-000001", steps=1, optimizer=small)
    for name, step in (("second", 3), ("third", 1)):
        got, want = weights(tmp_path, name, 1), weights(tmp_path, "first", step)
        assert all(np.array_equal(got[key], want[key]) for key in want)
    assert any((weights(tmp_path, "second", 1)[key] != weights(tmp_path, "third", 1)[key]).any() for key in want)


def test_a_resumed_run_does_not_start_again(tmp_path):
    run(tmp_path, "first")
    run(tmp_path, "second", start=tmp_path / "first")
    before = weights(tmp_path, "second", 2)
    run(tmp_path, "second", resume=True, start=tmp_path / "moved", steps=3)
    assert all(np.array_equal(weights(tmp_path, "second", 2)[key], value) for key, value in before.items())


def test_what_cannot_be_started_from(tmp_path):
    with pytest.raises(UserError, match=r"training\.start_from: .*missing is neither a run folder nor a checkpoint"):
        run(tmp_path, "second", start=tmp_path / "missing")
    run(tmp_path, "first")
    with pytest.raises(UserError, match=r"does not fit the model of the config: .*w_in: shape"):
        run(tmp_path, "third", start=tmp_path / "first", model={"moe": {"expert_hidden": 8}})
    with pytest.raises(UserError, match=r"training\.start_from: .* has another tokenizer than data\.tokenizer gives"):
        run(
            tmp_path,
            "fourth",
            start=tmp_path / "first",
            model={"vocab_size": 257},
            data={"tokenizer": {"name": "bpe", "vocab_size": 257}},
        )


def test_longer_texts_with_other_positions_and_data(tmp_path):
    """The sequences have the new length, and what has changed is said and recorded, also in a run that is resumed."""
    values = {"attention": {"num_kv_heads": 2}}
    run(tmp_path, "short", steps=1, model=values)
    (tmp_path / "other.txt").write_text("".join(f"line {i} of another text\n" for i in range(400)))
    data = {"sequence_length": 80, "source": {"paths": [str(tmp_path / "other.txt")], "validation_paths": []}}
    longer = {"attention": {**values["attention"], "rope_bases": [40.0, 9.0]}}
    training = {"evaluation_interval": 0, "start_from": str(tmp_path / "short")}
    said = io.StringIO()
    for steps in (1, 2):
        config = tiny_config(
            tmp_path,
            run={"dir": str(tmp_path / "long")},
            model=longer,
            data=data,
            training={**training, "steps": steps},
            optimizer={"schedule": {"name": "constant"}},
        )
        train(config, resume=steps == 2, console=Console(file=said, width=200))
    (lines,) = (text.splitlines() for text in said.getvalue().split("resuming")[:1])
    assert "rope bases  40 9" in lines
    assert f"starting    with the weights of {tmp_path / 'short/checkpoints/step-000001'}" in lines
    assert "changed     data.sequence_length: 32 -> 80" in lines
    assert "changed     model.attention.rope_bases.values: [] -> [40.0, 9.0]" in lines
    meta = load_checkpoint(tmp_path / "long/checkpoints/step-000002").meta
    assert meta.tokens == 2 * 4 * 80
    assert meta.config["model"]["attention"]["rope_bases"]["values"] == [40.0, 9.0]
    assert (meta.origin["checkpoint"], meta.origin["step"]) == (str(tmp_path / "short/checkpoints/step-000001"), 1)
    assert meta.origin["changed"]["data.sequence_length"] == [32, 80]
    assert meta.origin["changed"]["model.attention.rope_bases.kind"] == ["none", "list"]
    assert load_checkpoint(tmp_path / "short/checkpoints/step-000001").meta.origin is None


def test_other_texts_in_the_tokens_of_the_first_run(tmp_path):
    """A tokenizer trained on other texts has other tokens, and the message says how to keep the first one."""
    run(tmp_path, "first", steps=1, data={"tokenizer": {"name": "bpe", "vocab_size": 300}})
    (tmp_path / "other.txt").write_text("".join(f"line {i} of another text\n" for i in range(400)))
    source = {"paths": [str(tmp_path / "other.txt")], "validation_paths": []}
    with pytest.raises(
        UserError, match=r"expected data\.tokenizer as in .*, or for other texts {name: file, path: .*first}"
    ):
        run(
            tmp_path,
            "second",
            start=tmp_path / "first",
            data={"source": source, "tokenizer": {"name": "bpe", "vocab_size": 300}},
        )
    kept = {"name": "file", "path": str(tmp_path / "first")}
    run(tmp_path, "second", steps=1, start=tmp_path / "first", data={"source": source, "tokenizer": kept})
    one, other = (load_checkpoint(tmp_path / name / "checkpoints/step-000001").meta for name in ("first", "second"))
    assert (one.tokenizer == other.tokenizer, one.data == other.data) == (True, False)


def test_from_on_the_command_line(tmp_path):
    run(tmp_path, "première 😀", steps=1)
    (tmp_path / "c.yaml").write_text(yaml.dump(tiny_values(tmp_path, run={"dir": str(tmp_path / "again")})))
    arguments = [str(tmp_path / "c.yaml"), "--from", str(tmp_path / "première 😀"), "--set", "training.steps=1"]
    done = CliRunner().invoke(app, ["train", *arguments])
    assert done.exit_code == 0, done.output
    origin = load_checkpoint(tmp_path / "again/checkpoints/step-000001").meta.origin
    assert origin == {"checkpoint": str(tmp_path / "première 😀/checkpoints/step-000001"), "step": 1, "changed": {}}
