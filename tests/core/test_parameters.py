from typing import Any

import numpy as np
import pytest

from moeport.core import parameters
from moeport.core.parameters import (
    InitialWeights,
    ParameterSpec,
    generator,
    initial_parameters,
    initial_value,
    subtree,
    with_prefix,
)
from moeport.core.weights import Box

GOLDEN_WEIGHT = [[0.2607300877571106, 0.211747407913208], [-0.30640265345573425, -0.2308441549539566]]
GOLDEN_NOISE = [0.18632352352142334, 0.03918391466140747, 0.8657200932502747]


def test_initial_values_are_the_same_everywhere():
    """A change here changes what every run starts from: it needs a new INITIAL_VALUES_VERSION."""
    value = initial_value(ParameterSpec("layers.0.attention.q", (2, 2), std=0.5), seed=7)
    assert value.dtype == np.float32
    assert value.tolist() == GOLDEN_WEIGHT


def test_noise_is_the_same_everywhere():
    assert generator(7, "noise", 3, 0, "second_expert").random(3, np.float32).tolist() == GOLDEN_NOISE


@pytest.mark.parametrize("width", [1, 5, 8, 13])
def test_rows_are_those_of_a_table_that_is_drawn_as_a_whole(width):
    table = generator(3, "noise", 1).random((9, width), np.float32)
    for first in range(9):
        for end in range(first, 10):
            assert np.array_equal(parameters.uniform_rows(range(first, end), width, 3, "noise", 1), table[first:end])


def test_values_depend_on_name_and_seed_but_not_on_order_or_company():
    specs = [ParameterSpec(name, (3, 2)) for name in ("a", "b", "c")]
    forwards, backwards = initial_parameters(specs, 1), initial_parameters(specs[::-1], 1)
    for name in "abc":
        assert forwards[name].tolist() == backwards[name].tolist()
    assert initial_parameters(specs[1:2], 1)["b"].tolist() == forwards["b"].tolist()
    assert initial_parameters(specs, 2)["b"].tolist() != forwards["b"].tolist()
    assert forwards["a"].tolist() != forwards["b"].tolist()


PARTS: list[tuple[str, tuple[int, ...], list[tuple[int, ...]]]] = [
    ("head.weight", (7, 5), [(2, 1), (3, 2), (7, 3), (1, 5), (6, 5)]),
    ("layers.0.moe.experts.w_in", (3, 8, 4), [(2, 3, 4), (1, 8, 2), (3, 1, 1), (2, 8, 4)]),
    ("wide.weight", (3, 20), [(2, 20), (1, 7), (3, 5)]),
    ("bias", (40,), [(13,), (12,), (1,)]),
    ("layers.0.moe.experts.bias", (5,), [(2,), (1,)]),
]
"""Name and shape of a parameter, and shapes of parts, some of which end within blocks of 12 entries."""


@pytest.mark.parametrize(("name", "shape", "parts"), PARTS)
def test_a_part_is_drawn_as_in_the_whole(monkeypatch, name, shape, parts):
    monkeypatch.setattr(parameters, "BLOCK_ENTRIES", 12)
    weights = InitialWeights([ParameterSpec(name, shape)], 3)
    whole = weights[name]
    assert len(np.unique(whole)) == whole.size
    for part in parts:
        for start in np.ndindex(*(size - count + 1 for size, count in zip(shape, part, strict=True))):
            box = Box(start, part)
            assert np.array_equal(weights.read(name, box), whole[box.slices]), (box, shape)
    assert weights.read(name, Box((0,) * len(shape), (0, *shape[1:]))).shape == (0, *shape[1:])


def test_only_the_blocks_of_a_part_are_drawn(monkeypatch):
    made = []

    def noted(*key):
        made.append(key)
        return generator(*key)

    monkeypatch.setattr(parameters, "generator", noted)
    monkeypatch.setattr(parameters, "BLOCK_ENTRIES", 8)
    weights = InitialWeights([ParameterSpec("experts.w_in", (4, 4, 4)), ParameterSpec("head", (100, 4))], 5)
    weights.read("experts.w_in", Box((1, 2, 0), (2, 2, 4)))
    weights.read("head", Box((3, 1), (4, 1)))
    drawn = [("experts.w_in", 1, 1), ("experts.w_in", 2, 1), ("head", 1), ("head", 2), ("head", 3)]
    assert made == [(5, "parameter", *block) for block in drawn]


def test_values_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(parameters, "BLOCK_ENTRIES", 256)
    monkeypatch.setattr(parameters, "WORTH_A_THREAD", 1)
    specs = [ParameterSpec("experts.w_in", (5, 33, 7)), ParameterSpec("head", (300, 16))]
    one, *others = (dict(InitialWeights(specs, 1, threads=n)) for n in (1, 2, 7))
    for other in others:
        assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_normal_values_have_the_standard_deviation(std):
    value = initial_value(ParameterSpec("weight", (100, 100), std=std), seed=0)
    assert abs(value.std() / std - 1) < 0.03
    assert abs(value.mean()) < 0.04 * std


@pytest.mark.parametrize(("init", "want"), [("ones", 1.0), ("zeros", 0.0)])
def test_constant_values(init, want):
    value = initial_value(ParameterSpec("weight", (2, 3), init), seed=0)
    assert value.dtype == np.float32
    assert value.tolist() == [[want] * 3] * 2


def test_generators_differ_by_every_part_of_their_purpose():
    keys: list[tuple[Any, ...]] = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 2)]
    assert len({float(generator(*key).random()) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("spec", "decays"),
    [
        (ParameterSpec("matrix", (2, 3)), True),
        (ParameterSpec("experts", (4, 2, 3)), True),
        (ParameterSpec("norm", (3,), "ones"), False),
        (ParameterSpec("state", (2, 3), trainable=False), False),
    ],
)
def test_matrices_that_are_trained_decay(spec, decays):
    assert spec.decays is decays


@pytest.mark.parametrize(("shape", "size"), [((2, 3), 6), ((5,), 5), ((2, 0), 0), ((), 1)])
def test_size(shape, size):
    assert ParameterSpec("x", shape).size == size


def test_prefixes():
    specs = with_prefix("router", [ParameterSpec("weight", (2,)), ParameterSpec("bias", (3,), trainable=False)])
    assert specs == [
        ParameterSpec("router.weight", (2,)),
        ParameterSpec("router.bias", (3,), trainable=False),
    ]
    params = {"layers.1.a": 1, "layers.10.a": 2, "layers.1.b.c": 3, "layers.1": 4}
    assert subtree("layers.1", params) == {"a": 1, "b.c": 3}
