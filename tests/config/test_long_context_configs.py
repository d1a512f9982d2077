"""The files in configs/long_context."""

from pathlib import Path

import pytest

from moeport.config import load_config
from moeport.model.rope_bases import bases_of
from moeport.training.run_dir import leaves

FOLDER = Path(__file__).parents[2] / "configs" / "long_context"
METHODS = ("abf", "harpe", "pi", "yarn")


def values(name):
    config = load_config(FOLDER / f"{name}.yaml")
    assert config.run.dir == Path("runs/long_context") / name
    return leaves(config.model_dump(mode="json"))


def differing(one, other):
    one, other = values(one), values(other)
    return {key for key in one | other if one[key] != other[key]}


def test_the_folder_has_a_file_for_each_method():
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == sorted(["short", *METHODS])


@pytest.mark.parametrize("name", METHODS)
def test_methods_differ_in_rotary_positions_alone(name):
    assert {key.rpartition(".rope_")[0] for key in differing(name, "abf") - {"run.dir"}} <= {"model.attention"}
    changed = {key for key in differing(name, "short") if key.startswith(("model.", "data."))}
    assert {key for key in changed if ".rope_" not in key} == {"data.sequence_length"}
    assert changed != {"data.sequence_length"}
    assert values(name)["training.start_from"] == values("short")["run.dir"]


def test_harpe_ends_at_the_base_of_abf():
    harpe, abf = (load_config(FOLDER / f"{name}.yaml").model for name in ("harpe", "abf"))
    assert len(set(bases_of(harpe))) == harpe.num_kv_heads == 4
    assert harpe.attention.rope_bases.high == abf.attention.rope_base
