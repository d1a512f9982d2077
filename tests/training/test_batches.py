"""Batches are drawn with no backend, no parameters and no trainer."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moeport.core.parameters import generator
from moeport.data.document_starts import document_starts
from moeport.training.batches import Batches
from moeport.training.task import build_task
from tests.training.tiny import tiny_config


@pytest.fixture
def task_of(tmp_path):
    def build(**training):
        moe = {"router": {"name": "switch"}, "capacity": {"policy": "factor", "factor": 1.0, "drop": "random"}}
        config = tiny_config(tmp_path, model={"moe": moe}, training={"batch_size": 8, **training})
        return build_task(config, report=lambda _: None)

    return build


def world_of(rank, size) -> Any:
    return SimpleNamespace(rank=rank, size=size)


def drawn(task, step, rank=0, size=1):
    return list(Batches(task.config.training, task.model(), task.train, world_of(rank, size)).of_step(step))


def arrays(batches):
    """Tokens, targets and noise of micro-batches, joined along the batch."""
    joined = {name: np.concatenate([batch.noise[name] for batch in batches]) for name in batches[0].noise}
    for name in ("token_BS", "target_BS"):
        joined[name] = np.concatenate([getattr(batch, name) for batch in batches])
    return joined


def test_a_step_alone_decides_a_batch(task_of):
    task = task_of()
    batches = Batches(task.config.training, task.model(), task.train, world_of(0, 1))
    first = [arrays(list(batches.of_step(step))) for step in (0, 30, 7)]
    for step, found in zip((7, 0, 30), (first[2], first[0], first[1]), strict=True):
        again = arrays(drawn(task, step))
        assert found.keys() == again.keys()
        for name, value in found.items():
            np.testing.assert_array_equal(value, again[name])
    assert not np.array_equal(first[0]["token_BS"], first[1]["token_BS"])


@pytest.mark.parametrize(("ranks", "parts"), [(1, 4), (2, 1), (2, 2), (4, 2)])
def test_ranks_and_micro_batches_cut_the_batch_and_its_noise_in_order(task_of, ranks, parts):
    whole = arrays(drawn(task_of(), 5))
    task = task_of(gradient_accumulation=parts)
    cut = [drawn(task, 5, rank, ranks) for rank in range(ranks)]
    assert {len(batches) for batches in cut} == {parts}
    assert {len(batch.token_BS) for batches in cut for batch in batches} == {8 // ranks // parts}
    found = arrays([batch for batches in cut for batch in batches])
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (2, 2)])
def test_documents_are_those_of_the_tokens(tmp_path, ranks, parts):
    data = {"document_mask": True, "sequence_length": 64}
    task = build_task(
        tiny_config(tmp_path, data=data, training={"batch_size": 8, "gradient_accumulation": parts}),
        report=lambda _: None,
    )
    ends = 0
    for rank in range(ranks):
        batches = Batches(task.config.training, task.model(), task.train, world_of(rank, ranks), task.first_token)
        for step in range(8):
            for batch in batches.of_step(step):
                ends += (batch.token_BS == task.first_token).sum()
                expected = document_starts(batch.token_BS, task.first_token)
                np.testing.assert_array_equal(batch.document_BS, expected)
                assert len(batch.document_BS) == 8 // ranks // parts
    assert ends
    assert task.describe().endswith("% of the pairs of tokens")


def test_noise_is_that_of_its_key(task_of):
    """The generator is keyed by seed, step, layer and name, so that a resumed run draws what the first one did."""
    task = task_of(seed=3)
    found = arrays(drawn(task, 11))
    (name,) = task.model().blocks[1].moe[""].noise
    want = generator(3, "noise", 11, 1, name).random((8, 32), np.float32)
    np.testing.assert_array_equal(found[f"1.{name}"], want)


def test_targets_are_the_next_tokens(task_of):
    (batch,) = drawn(task_of(), 0)
    assert batch.token_BS.shape == batch.target_BS.shape == (8, 32)
    np.testing.assert_array_equal(batch.token_BS[:, 1:], batch.target_BS[:, :-1])
