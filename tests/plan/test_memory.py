"""Predicted memory: what is counted, whether it fits, and what runs take."""

import json
import sys

import pytest

from moeport.cli.plan_options import memory_limits
from moeport.errors import UserError
from moeport.model.memory import ModelSizes, memory
from moeport.plan.cost import Cluster
from moeport.plan.memory import Limits, fitting, memory_lines
from moeport.plan.planner import Planner
from tests.comm.jobs import ROOT, Job, start
from tests.plan.test_planner import LINKS, config, uniform


def found_for(**changes):
    return Planner(config(**changes), 257, Cluster(1, 4, LINKS), uniform).places()


def test_placements_that_do_not_fit_are_left_out():
    found = found_for(parallelism={"shard": False})
    needs = sorted(placement.memory.total for placement in found)
    limits = Limits(4, on_cpu=False, device=needs[1])
    fit = fitting(found, limits)
    assert sorted(placement.memory.total for placement in fit) == needs[:2]
    assert ", fits." in memory_lines(fit[0], limits)[0]
    with pytest.raises(UserError, match=r"no placement fits: the smallest needs about .* per rank; an accelerator has"):
        fitting(found, Limits(4, on_cpu=False, device=0.9 * needs[0]))


def test_the_ranks_of_a_node_share_its_memory():
    found = found_for()
    on_host = [placement.memory.on_host(computes_there=True) for placement in found]
    assert fitting(found, Limits(4, on_cpu=True, device=1.0, host=4 * max(on_host))) == found
    with pytest.raises(UserError, match=r"the ranks of a node .* and it has .* more nodes"):
        fitting(found, Limits(4, on_cpu=True, host=3 * min(on_host)))
    lines = memory_lines(found[0], Limits(4, on_cpu=False))
    assert lines[1].startswith("Host of 4 ranks (--ranks-per-node): ")


def test_options():
    limits = memory_limits(config(), 8, "80GB,512GB")
    assert (limits.device, limits.host, limits.on_cpu) == (80e9, 512e9, False)
    assert memory_limits(config(), 8, "80GB").host == memory_limits(config(), 8, None).device == float("inf")
    on_cpu = config(backend={"device": "cpu"})
    assert memory_limits(on_cpu, 8, "512GB").host == 512e9
    with pytest.raises(UserError, match="expected the memory of a node, as in 512GB"):
        memory_limits(on_cpu, 8, "80GB,512GB")
    with pytest.raises(UserError, match="is not a size"):
        memory_limits(config(), 8, "much")
    with pytest.raises(UserError, match=r"--memory 80,512GB: 80 bytes are too few; expected sizes with units"):
        memory_limits(config(), 8, "80,512GB")


def memory_of(ranks=1, expert=1, **changes):
    values = config(**changes)
    return memory(values, ModelSizes.of(values, 257), ranks=ranks, expert=expert, tokens=64)


def test_cast_weights_are_counted_where_they_are_kept():
    sizes = ModelSizes.of(config(backend={"dtype": "bfloat16"}), 257)
    assert memory_of(backend={"dtype": "bfloat16"}).cast == 2 * (sizes.dense_cast + sizes.expert_cast)
    assert sizes.expert_cast == sizes.expert_total
    assert 0 < sizes.dense_cast < sizes.dense_total
    assert memory_of(backend={"dtype": "float32"}).cast == 0
    assert memory_of(4, backend={"dtype": "bfloat16"}).cast == 0  # gathered in bfloat16
    assert memory_of(4, backend={"dtype": "bfloat16"}, parallelism={"shard": False}).cast == 0
    assert memory_of(4, 4, backend={"dtype": "bfloat16"}).cast == 2 * sizes.expert_cast / 4  # no other rank has them
    assert memory_of(backend={"name": "mindspore", "device": "npu", "dtype": "bfloat16"}).cast == 0


def test_padded_rows_are_counted():
    plain = {"num_experts": 16, "expert_hidden": 8, "router": {"name": "topk", "top_k": 2}, "first_dense": 1}
    model = {"num_layers": 2, "d_model": 32, "attention": {"num_heads": 2}}
    sections = {"model": model | {"moe": plain}, "backend": {"dtype": "float32"}}
    rounded = {"model": model | {"moe": plain | {"capacity": {"policy": "round", "tile": 8}}}}
    row = 4 * (2 * 32 + 3 * 8)
    extra = memory_of(**sections | rounded).activations - memory_of(**sections).activations
    assert extra == 8 / 2 * 16 * row
    padded = memory_of(**sections | {"backend": {"name": "mindspore", "dtype": "float32"}})
    assert padded.activations - memory_of(**sections).activations == 64 * 2 * row


def test_tables_of_several_rotary_bases_are_counted():
    def activations(data, **attention):
        model = {"num_layers": 2, "d_model": 32, "attention": {"num_heads": 4, "num_kv_heads": 2, **attention}}
        return memory_of(model=model, data={"sequence_length": 16, **data}, backend={"dtype": "float32"}).activations

    for data, rows in (({}, 16), ({"document_mask": True}, 16 + 64)):
        assert activations(data, rope_bases=[50.0, 3.0]) - activations(data) == 2 * 4 * rows * 2 * 8


def test_a_checkpoint_is_copied_once_over_all_ranks():
    one, four = memory_of(1), memory_of(4, 2)
    assert one.saved == one.parameters + one.moments
    assert four.saved == one.saved / 4


SHAPES = {
    "parameters": ({"num_layers": 4, "d_model": 256, "moe": {"num_experts": 16, "expert_hidden": 384}}, 1, 32),
    "activations": ({"num_layers": 8, "d_model": 128, "moe": {"num_experts": 4, "expert_hidden": 256}}, 16, 512),
}
"""Model, sequences and their length. Of the first, most is parameters and moments, of the second activations."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("case", ["parameters", pytest.param("activations", marks=pytest.mark.slow)])
def test_a_run_takes_about_what_is_predicted(tmp_path, case):
    pytest.importorskip("torch")
    model, sequences, length = SHAPES[case]
    sections = {
        "model": model,
        "data": {"sequence_length": length},
        "training": {"batch_size": sequences},
        "backend": {"dtype": "float32"},
    }
    folder = tmp_path / "job"
    script = str(ROOT / "tests/plan/steps_memory.py")
    job = start("torch", 1, [script, str(folder), json.dumps(sections)], folder)
    try:
        assert (job.wait(280), job.left()) == (0, []), Job.output_of(folder)[-4000:]
    finally:
        job.end()
    found = json.loads((folder / "found.json").read_text())
    assert found["predicted"] > 200 * 2**20, "of a small model it is the libraries that are compared"
    assert 0.6 < found["taken"] / found["predicted"] < 1.8, found
