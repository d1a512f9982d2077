import numpy as np
import pytest
import torch

from moeport.backends.torch import sorting
from moeport.backends.torch.ops import TorchOps
from moeport.core.ops import Ops
from tests.support import rng

SPECIAL = [-np.inf, -1e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3.4e38, np.inf, np.nan]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def by_stable_sort(x, k):
    return x.sort(stable=True, dim=-1, descending=True).indices[..., :k]


def draws(dtype):
    """Rows with many ties, all special values among them, and rows of one value."""
    random = rng(1)
    for width in (1, 2, 7, 8, 33, 128):
        few = random.integers(-2, 3, (50, width)).astype(np.float64)
        special = random.choice(SPECIAL, (50, width))
        lowest = np.where(random.random((20, width)) < 0.8, -np.inf, -1.0)
        same = np.repeat(np.array(SPECIAL)[:, None], width, axis=1)
        yield torch.tensor(np.concatenate([few, special, lowest, same, random.standard_normal((9, width))])).to(dtype)


@pytest.mark.parametrize("small", [0, sorting.SMALL])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_best_are_those_of_a_stable_sort(monkeypatch, dtype, small):
    monkeypatch.setattr(sorting, "SMALL", small)
    for x in draws(dtype):
        for k in {1, 2, 3, 8, 9, x.shape[-1]}:
            if k <= x.shape[-1]:
                assert torch.equal(sorting.best_ids(x, k), by_stable_sort(x, k)), (x.shape, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_are_in_the_order_of_the_floats(dtype):
    """The least integer is free: it marks what has been found."""
    x = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    keys = sorting.ordered_keys(x)
    for i in range(len(x)):
        for j in range(len(x)):
            if not (x[i].isnan() or x[j].isnan()):
                assert (keys[i] < keys[j], keys[i] == keys[j]) == (x[i] < x[j], x[i] == x[j])
    assert keys[-1] == keys.max() > keys[-2]
    assert sorting.ordered_keys(-x)[-1] == keys[-1]  # a NaN with its sign bit set
    assert keys.min() > torch.iinfo(keys.dtype).min


@pytest.mark.parametrize("groups", [1, 8, 255, 256, 257, 32_768, 32_769, 65_536, 70_000])
def test_every_form_sorts_like_the_composition(groups):
    """By numpy, by torch as on CUDA, and inside a transform."""
    ops = TorchOps(torch.device("cpu"))
    for entries in (0, 1, 2, 1000):
        group_N = torch.from_numpy(rng(entries).integers(max(0, groups - 9), groups, entries))
        want = Ops.sort_by_group(ops, group_N, groups)
        forms = [ops.sort_by_group(group_N, groups), sorting.by_group(group_N, groups)]
        for form in forms:
            assert [x.dtype for x in form] == [torch.int64] * 3
            assert all(torch.equal(got, expected) for got, expected in zip(form, want, strict=True))
        assert torch.equal(torch.tensor(np.asarray(want[0])[np.asarray(want[1])]), torch.arange(entries))


def test_sorting_works_inside_a_transform():
    ops = TorchOps(torch.device("cpu"))

    def total(x):
        best = ops.topk_ids(x, 2)
        order, place, _ = ops.sort_by_group(best.reshape(-1), 4)
        return (ops.take_last(x, best).reshape(-1)[order] * place).sum()

    x = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.0, 0.0, -1.0, 5.0]])
    assert torch.func.grad(total)(x).shape == x.shape
