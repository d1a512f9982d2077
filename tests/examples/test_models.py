"""examples/models: the configs are the published shapes, planned as README.md says, and train at a small size."""

import re
import shlex
from pathlib import Path

import pytest

from moeport.cli.main import whole_command
from moeport.config import load_config
from moeport.config.model import ModelConfig
from moeport.convert.config_in import settings_of
from moeport.convert.family import family_of
from tests.convert.test_published import PLAIN, PUBLISHED

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples/models"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
PUBLISHED_AS = {
    "olmoe-1b-7b": "OLMoE-1B-7B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "mixtral-8x7b": "Mixtral-8x7B",
    "deepseek-v3": "DeepSeek-V3",
}
COUNTED = re.compile(r"^\| \[`(.+)\.yaml`\]\(.+\) \| ([\d.]+)B, ([\d.]+)B \| ([\d,]+) \| ([\d,]+) \|$", re.MULTILINE)
ROWS = {name: numbers for name, *numbers in COUNTED.findall(README)}
EXTENDED = {"attention": {"rope_scaling"}, "moe": {"load_balance"}}
"""Of DeepSeek-V3's config.json, what came with its longer texts, and the balance loss, which it does not have."""


def test_every_config_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PUBLISHED_AS) == set(ROWS)


@pytest.mark.parametrize("name", PUBLISHED_AS)
def test_the_model_is_that_of_the_published_config_json(name):
    keys, _, _ = PUBLISHED[PUBLISHED_AS[name]]
    settings = settings_of(family_of(str(keys["model_type"])), {**PLAIN, **keys}, "config.json")
    found = load_config(FOLDER / f"{name}.yaml").model
    left_out = EXTENDED if name == "deepseek-v3" else {}
    assert shape(found, left_out) == shape(ModelConfig.model_validate(settings.model), left_out)


def shape(model, left_out):
    """All that decides what the model computes; dense_hidden only if a block is dense."""
    values = model.model_dump(exclude=left_out)
    values["attention"]["num_kv_heads"] = values["attention"]["num_kv_heads"] or model.attention.num_heads
    if model.moe.first_dense == 0:
        del values["dense_hidden"]
    if "load_balance" in values["moe"]:
        values["moe"]["load_balance"]["coefficient"] = float(f"{model.moe.load_balance.coefficient:.2e}")
    return values


@pytest.mark.parametrize("name", PUBLISHED_AS)
def test_the_counted_parameters_are_the_published_ones(name):
    total, active, counted, counted_active = (float(number.replace(",", "")) for number in ROWS[name])
    assert counted == pytest.approx(total * 1e9, rel=0.005)
    assert counted_active == pytest.approx(active * 1e9, rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED_AS)
def test_the_config_asks_for_the_fastest_of_its_plan(name):
    section = README.partition(f"generated: {name} (")[2].partition("<!-- end")[0]
    expert, _, algorithm, chunks = re.search(r"─\n +(\d+) +(\d+) +(\w+) +(\d+) ", section).groups()
    config = load_config(FOLDER / f"{name}.yaml")
    assert (config.parallelism.expert, config.comm.algorithm, config.comm.chunks) == (
        int(expert),
        algorithm,
        int(chunks),
    )


SLOW = [name for name in PUBLISHED_AS if name != "deepseek-v3"]


@pytest.mark.parametrize("name", ["deepseek-v3", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_small_one_trains(name, tmp_path, monkeypatch, capsys):
    """By the command of README.md, with less text, shorter and for two steps."""
    pytest.importorskip("torch")
    (command,) = re.findall(r"^\$ moeport (train (?s:.+?))\n```", README, re.MULTILINE)
    words = shlex.split(command.replace("\\\n", " ").replace("deepseek-v3", name))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for number in range(8):
        (tmp_path / f"docs/{number}.md").write_text("".join(f"{n} and {number} is {n + number}\n" for n in range(20)))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    less = ["run.dir=run", "training.steps=2", "data.sequence_length=32", "data.validation_fraction=0.5"]
    whole_command()([*words, *(part for value in less for part in ("--set", value))], standalone_mode=False)
    assert "2 steps done" in capsys.readouterr().out
