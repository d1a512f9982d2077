import pytest

from moeport.config.training import OptimizerConfig
from moeport.training.schedule import learning_rate


def rates(steps, **schedule):
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule)
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_reaches_the_peak():
    for name in ("cosine", "wsd", "inverse_sqrt", "constant"):
        assert rates(10, name=name, warmup_steps=4)[:4] == [0.5, 1.0, 1.5, 2.0]


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    for name in ("cosine", "wsd", "inverse_sqrt", "constant"):
        assert rates(3, name=name, warmup_steps=4) == [0.5, 1.0, 1.5]


def test_inverse_sqrt_continues_from_the_warm_up():
    values = rates(16, name="inverse_sqrt", warmup_steps=4)
    assert values[:4] == [0.5, 1.0, 1.5, 2.0]
    assert values[4:] == pytest.approx([2.0 * (4 / step) ** 0.5 for step in range(5, 17)])
    assert values[15] == pytest.approx(1.0)
    assert rates(4, name="inverse_sqrt") == pytest.approx([2.0, 2.0 / 2**0.5, 2.0 / 3**0.5, 1.0])


def test_constant_stays():
    assert rates(5, name="constant") == [2.0] * 5


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_the_final_fraction():
    values = rates(1001, name="cosine", final_fraction=0.1)
    assert values[0] == 2.0
    assert values[500] == pytest.approx(2.0 * 0.55, rel=2e-3)
    assert values[-1] == pytest.approx(0.2, rel=1e-3)
    assert values == sorted(values, reverse=True)


def test_wsd_is_stable_and_then_decays_linearly():
    values = rates(10, name="wsd", warmup_steps=2, decay_fraction=0.4)
    assert values == pytest.approx([1, 2, 2, 2, 2, 2, 2, 1.5, 1.0, 0.5])
