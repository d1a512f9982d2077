"""Which part of a parameter a rank holds, by our own arithmetic and by PyTorch's."""

from itertools import product

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from moeport.backends.torch.placing import Held, divided  # noqa: E402
from moeport.backends.torch.sharding import shard_dim  # noqa: E402
from moeport.core.weights import Box  # noqa: E402

SHAPES = [(1,), (3,), (8,), (7, 5), (16, 4), (2, 6, 8), (5, 3, 4), (257, 2)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_ranks_hold_what_torch_chunk_gives_them(shape, ranks):
    x = torch.arange(np.prod(shape)).reshape(shape)
    for dim in range(len(shape)):
        chunks = torch.chunk(x, ranks, dim)
        for rank in range(ranks):
            box = divided(Box.whole(shape), dim, rank, ranks)
            mine = x[box.slices]
            if rank < len(chunks):
                assert torch.equal(mine, chunks[rank])
            else:
                assert mine.numel() == 0


@pytest.mark.parametrize(
    ("shape", "ranks", "dim"),
    [
        ((8, 64, 32), 4, 0),
        ((8, 64, 32), 16, 1),
        ((6, 64, 32), 4, 1),
        ((6, 63, 32), 4, 2),
        ((6, 63, 31), 4, 0),  # nothing else divides
        ((50257, 768), 8, 0),  # uneven by less than an eighth
        ((3,), 2, 0),
    ],
)
def test_the_dimension_that_gives_all_ranks_the_same(shape, ranks, dim):
    assert shard_dim(shape, ranks) == dim


@pytest.mark.parametrize("shape", [(5, 4), (2, 9, 3), (3,), (1, 1)])
@pytest.mark.parametrize("copies", [1, 2, 3, 8])
def test_copies_write_each_entry_once(shape, copies):
    whole = (7, *shape[1:])
    part = Box((2, *(0 for _ in shape[1:])), shape)
    x = torch.rand(shape)
    values, counts, written = np.zeros(whole), np.zeros(whole), []
    for copy in range(copies):
        shard = Held(whole, part, copy, copies).shard("x", x)
        values[shard.box.slices] += shard.array
        counts[shard.box.slices] += 1
        written.append(shard.box.size)
    assert np.array_equal(values[part.slices], x.numpy())
    assert counts[part.slices].min() == counts.max() == 1
    assert counts.sum() == part.size
    if max(shape) >= copies:
        assert max(written) <= 2 * part.size / copies


def test_a_part_is_filled_piece_by_piece(monkeypatch):
    monkeypatch.setattr("moeport.backends.torch.placing.PIECE_ENTRIES", 10)
    for shape, start in product([(3, 4, 5), (2, 1, 3), (0, 4, 5)], [(0, 0, 0), (1, 2, 1)]):
        whole = np.random.default_rng(0).random((6, 7, 8), np.float32)
        whole.flags.writeable = False  # as arrays of files are
        box, target = Box(start, shape), torch.full(shape, torch.nan)
        Held(whole.shape, box, 0, 1).fill(target, {"x": whole}, "x")
        assert np.array_equal(target.numpy(), whole[box.slices])
