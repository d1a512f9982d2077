"""A rotary base per key-value head, and the search for bases, against loops over heads, positions and pairs."""

import math

import numpy as np
import pytest

from moeport.config.model import AttentionConfig, ModelConfig, RopeBasesConfig, RopeScalingConfig
from moeport.core.parameters import initial_parameters
from moeport.model.decoder import DecoderLM
from moeport.model.rope import rope_tables
from moeport.model.rope_bases import bases_of
from tests.conformance.targets import COMPOSED, TOLERANCE, Target, build, parameters
from tests.model.models import VOCABULARY, batch_of, model_config
from tests.support import rng

HEADS, GROUPS, WIDTH, LENGTH = 4, 2, 6, 7
BASES = (50.0, 3.0)
REFERENCE = Target("numpy", "cpu", "float64")


def listed(*values):
    return RopeBasesConfig(kind="list", values=values)


def grouped(bases, **options):
    return AttentionConfig(num_heads=HEADS, num_kv_heads=GROUPS, head_dim=WIDTH, rope_bases=bases, **options)


def found(bases, groups=GROUPS, width=WIDTH):
    attention = AttentionConfig(num_heads=groups, head_dim=width, rope_bases=bases)
    return bases_of(ModelConfig(attention=attention))


def turned(x_BSHA, position_BS, bases):
    """Pair by pair, as complex numbers, by the angles of the base of the head's group."""
    y_BSHA, (_, _, heads, width) = np.zeros_like(x_BSHA), x_BSHA.shape
    for b, s, h in np.ndindex(x_BSHA.shape[:3]):
        base = bases[h // (heads // len(bases))]
        for i in range(width // 2):
            angle = position_BS[b, s] * base ** (-2 * i / width)
            pair = complex(x_BSHA[b, s, h, i], x_BSHA[b, s, h, i + width // 2]) * complex(
                math.cos(angle), math.sin(angle)
            )
            y_BSHA[b, s, h, i], y_BSHA[b, s, h, i + width // 2] = pair.real, pair.imag
    return y_BSHA


@pytest.mark.parametrize("target", parameters(COMPOSED))
@pytest.mark.parametrize("heads", [HEADS, GROUPS])
def test_every_head_turns_by_the_base_of_its_group(heads, target):
    """Queries and keys, on every backend; also with other positions in each sequence, as in a continuation."""
    ops, kind = target.build().ops, target.dtype
    run = DecoderLM(model_config(attention=grouped(listed(*BASES))), VOCABULARY).forward_pass(ops, LENGTH, kind)
    x_BSHA = ops.to_numpy(ops.cast(ops.from_numpy(rng(1).standard_normal((2, LENGTH, heads, WIDTH))), kind))
    x = ops.cast(ops.from_numpy(x_BSHA), kind)
    order_BS = np.array([range(LENGTH), [3, 0, 1, 2, 6, 5, 4]])
    tables = tuple(ops.take_rows(table, ops.from_numpy(order_BS)) for table in run.rope)
    plain_BS = np.broadcast_to(np.arange(LENGTH), (2, LENGTH))
    for given, position_BS in ((run, plain_BS), (type(run)(ops, kind, tables), order_BS)):
        got = ops.to_numpy(given.rotated(x)).astype(float)
        np.testing.assert_allclose(got, turned(x_BSHA.astype(float), position_BS, BASES), atol=10 * TOLERANCE[kind])


@pytest.mark.parametrize("target", parameters([each for each in COMPOSED if each.dtype != "bfloat16"]))
def test_backends_agree(target):
    config = model_config(attention=grouped(listed(*BASES), qk_norm=True))
    model = DecoderLM(config, VOCABULARY)
    params, batch = initial_parameters(model.parameter_specs(), 0), batch_of(model)
    want = build(REFERENCE).evaluation_model(model, params).logits(batch.token_BS)
    got = target.build().evaluation_model(model, params).logits(batch.token_BS)
    np.testing.assert_allclose(got, want, atol=100 * TOLERANCE[target.dtype] * np.abs(want).max())
    other = DecoderLM(config.model_copy(update={"attention": grouped(listed(*BASES[::-1]), qk_norm=True)}), VOCABULARY)
    assert np.abs(build(REFERENCE).evaluation_model(other, params).logits(batch.token_BS) - want).max() > 1e-3


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_equal_bases_are_one_base_to_the_bit(dtype):
    same = [AttentionConfig(num_heads=2, rope_base=50.0), AttentionConfig(num_heads=2, rope_bases=listed(50.0, 50.0))]
    logits = []
    for attention in same:
        model = DecoderLM(model_config(attention=attention), VOCABULARY)
        params = initial_parameters(model.parameter_specs(), 0)
        evaluated = build(Target("numpy", "cpu", dtype)).evaluation_model(model, params)
        logits.append(evaluated.logits(batch_of(model).token_BS))
    np.testing.assert_array_equal(*logits)


def test_each_base_is_scaled():
    scaling = RopeScalingConfig(type="yarn", factor=4.0, original_positions=32)
    attention = grouped(listed(*BASES), rope_scaling=scaling)
    model, ops = DecoderLM(model_config(attention=attention), VOCABULARY), build(REFERENCE).ops
    for got, *want in zip(
        model.rope(ops, LENGTH, "float64"), *(rope_tables(LENGTH, WIDTH, base, scaling) for base in BASES), strict=True
    ):
        np.testing.assert_array_equal(got, np.concatenate(want, axis=1))


def test_uniform_bases_have_equal_steps():
    bases = RopeBasesConfig(kind="uniform", low=10.0, high=40.0)
    assert found(bases, groups=4) == pytest.approx((10, 20, 30, 40), rel=1e-15)
    assert found(bases.model_copy(update={"order": "descending"}), groups=4) == pytest.approx((40, 30, 20, 10))
    assert found(bases, groups=1) == (10.0,)


def slow_search(given, width, count):
    """The bases in the order in which they are chosen."""

    def extrema(base, sign):
        def w(m):
            return sum(2 * math.cos(m * base ** (-2 * j / width)) for j in range(width // 2)) / math.sqrt(width) * sign

        values = {m: w(m) for m in range(given.first_position, given.first_position + given.positions)}
        peaks = []
        for m, value in values.items():
            others = [n for n in range(m - given.spacing, m + given.spacing + 1) if n != m]
            if all(n in values and values[n] < value for n in others):
                peaks.append(m)
        return peaks

    def distance(some, others):
        if given.pairing == "order":
            return sum(abs(x - y) for x, y in zip(some, others, strict=False))
        return sum(min(abs(x - y) for y in others) for x in some)

    left, base = [], given.low
    while base <= given.high:
        left.append(base)
        base += given.step
    found = {base: (extrema(base, 1), extrema(base, -1)) for base in left}
    chosen = [left.pop(0)]
    while len(chosen) < count:
        peaks, valleys = (sorted({m for base in chosen for m in found[base][side]}) for side in (0, 1))
        best = min(left, key=lambda base: distance(found[base][0], valleys) + distance(found[base][1], peaks))
        chosen.append(best)
        left.remove(best)
    return chosen


@pytest.mark.parametrize("pairing", ["nearest", "order"])
def test_the_search_is_that_of_loops(pairing):
    given = RopeBasesConfig(
        kind="peak_valley", low=20.0, high=420.0, step=25.0, first_position=9, positions=290, spacing=4, pairing=pairing
    )
    want = slow_search(given, 8, 6)
    assert want != sorted(want)
    assert found(given, groups=6, width=8) == tuple(sorted(want))
    assert found(given.model_copy(update={"order": "descending"}), groups=6, width=8) == tuple(sorted(want)[::-1])


def test_the_default_search_always_gives_these_bases():
    """For 32 heads as wide as in the paper, which lists 11 of them: checkpoints do not hold what was found."""
    bases = found(RopeBasesConfig(kind="peak_valley"), groups=32, width=128)
    assert " ".join(f"{base / 1e6:.2f}" for base in bases) == (
        "1.00 1.27 1.36 1.45 1.48 1.78 1.84 2.05 2.17 2.23 2.47 2.50 2.86 2.89 2.98 3.19 3.22 3.43 3.61 3.64 3.67 3.70 "
        "3.73 3.79 4.33 4.36 4.39 4.42 4.45 4.48 4.81 4.96"
    )
