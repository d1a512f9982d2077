from typing import Any

import numpy as np
import pytest

from moeport.core.parameters import (
    ParameterSpec,
    generator,
    initial_parameters,
    initial_value,
    subtree,
    with_prefix,
)

GOLDEN_WEIGHT = [[0.3310643434524536, 0.036992743611335754], [-0.5674018263816833, -0.061229947954416275]]
GOLDEN_NOISE = [0.18632352352142334, 0.03918391466140747, 0.8657200932502747]


def test_initial_values_are_the_same_everywhere():
    """A change here changes what every run and checkpoint starts from."""
    value = initial_value(ParameterSpec("layers.0.attention.q", (2, 2), std=0.5), seed=7)
    assert value.dtype == np.float32
    assert value.tolist() == GOLDEN_WEIGHT


def test_noise_is_the_same_everywhere():
    assert generator(7, "noise", 3, 0, "second_expert").random(3, np.float32).tolist() == GOLDEN_NOISE


def test_values_depend_on_name_and_seed_but_not_on_order_or_company():
    specs = [ParameterSpec(name, (3, 2)) for name in ("a", "b", "c")]
    forwards, backwards = initial_parameters(specs, 1), initial_parameters(specs[::-1], 1)
    for name in "abc":
        assert forwards[name].tolist() == backwards[name].tolist()
    assert initial_parameters(specs[1:2], 1)["b"].tolist() == forwards["b"].tolist()
    assert initial_parameters(specs, 2)["b"].tolist() != forwards["b"].tolist()
    assert forwards["a"].tolist() != forwards["b"].tolist()


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
