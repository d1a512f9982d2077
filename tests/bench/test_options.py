"""Options of the benchmarks, checked before anything starts, and counts and sums as nccl-tests has them."""

from typing import Any

import numpy as np
import pytest

from moeport.bench import options
from moeport.bench.comm import _plan
from moeport.bench.operations import Elements, collective, sum_error
from moeport.bench.options import CommOptions, Files, Runs, Sizes, Target, Tokens, Variants, dtypes, one_dtype
from moeport.bench.output import Row, average_busbw, summary
from moeport.comm.exchange import EXCHANGES
from moeport.errors import UserError
from moeport.launch.launcher import Launch


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        (Sizes("1K", "4K", 2), [1024, 2048, 4096]),
        (Sizes("64k", "64K"), [65536]),
        (Sizes("3", "100"), [3, 12, 48]),
        (Sizes("1K", "3K", step="1K"), [1024, 2048, 3072]),
        (Sizes("10", "14", step="3"), [10, 13]),
        (Sizes("1KB", "1kb"), [1024]),
    ],
)
def test_sizes(sizes, found):
    assert sizes.values() == found


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (Sizes("4M", "64K"), "--minbytes 4M is above --maxbytes 64K; expected at most 64K, or a larger --maxbytes"),
        (Sizes("8M"), "--minbytes 8M is above --maxbytes 4M; expected at most 4M, or a larger --maxbytes"),
        (Sizes("\N{SUPERSCRIPT TWO}"), "--minbytes: invalid size '\N{SUPERSCRIPT TWO}'; expected bytes such as"),
        (Sizes("\N{ARABIC-INDIC DIGIT THREE}"), "--minbytes: invalid size"),
        (Sizes("0"), "--minbytes: invalid size '0'"),
        (Sizes("-1"), "--minbytes: invalid size '-1'"),
        (Sizes(maximum="1.5M"), "--maxbytes: invalid size '1.5M'"),
        (Sizes(maximum="KK"), "--maxbytes: invalid size 'KK'"),
        (Sizes(maximum=""), "--maxbytes: invalid size ''"),
        (Sizes(step="lots"), "--stepbytes: invalid size 'lots'"),
        (Sizes(step="0"), "--stepbytes: invalid size '0'"),
        (Sizes(step="1M", factor=2), "--stepbytes and --stepfactor both set the next size"),
        (Sizes(maximum="999999G"), "--maxbytes 999999G: this machine has "),
    ],
)
def test_faulty_sizes(sizes, message):
    with pytest.raises(UserError) as caught:
        sizes.values()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("asked", "backend", "device", "found"),
    [
        ("float32", "torch", "cpu", ["float32"]),
        ("float", "torch", "cpu", ["float32"]),
        ("double", "mindspore", "cpu", ["float64"]),
        ("bfloat16", "torch", "auto", ["bfloat16"]),
        ("all", "torch", "cpu", ["float32", "bfloat16", "float64"]),
        ("all", "mindspore", "cpu", ["float32", "float64"]),
    ],
)
def test_types_have_the_names_of_nccl_tests_too(asked, backend, device, found):
    assert dtypes(asked, backend, device) == found


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("half", "--datatype half: moeport computes in float32, float64; expected one of them, or all"),
        ("int8", "--datatype int8: moeport computes in float32, float64; expected one of them, or all"),
        ("bfloat16", "--datatype bfloat16: mindspore on cpu computes in float32, float64; expected one of them"),
    ],
)
def test_types_that_are_not_there(asked, message):
    with pytest.raises(UserError) as caught:
        dtypes(asked, "mindspore", "cpu")
    assert str(caught.value).startswith(message)


def test_a_layer_computes_in_one_type():
    assert one_dtype("double", "torch", "cpu") == "float64"
    with pytest.raises(UserError, match="--datatype all: a layer computes in one type"):
        one_dtype("all", "torch", "cpu")


def plan(*names, ranks=3, **changed):
    """The plan of a benchmark with these options, on a job of torch."""
    values: dict[str, Any] = {
        "sizes": Sizes(),
        "runs": Runs(),
        "dtype": "float32",
        "variants": Variants(),
        "tokens": Tokens(),
        "chunks": "1",
        "target": Target(),
        "files": Files(),
    }
    return _plan(CommOptions(names, **values | changed), Launch("torchrun", 0, ranks, 0, "127.0.0.1", 1))


def test_what_is_not_used_is_not_checked():
    unused = {"tokens": Tokens("nonsense", 7, 9), "chunks": "x", "variants": Variants("prod", "99")}
    assert plan("sendrecv", "all_to_all", **unused).names == ["sendrecv", "all_to_all"]
    assert plan("broadcast", variants=Variants("prod", "all")).roots == [0, 1, 2]
    assert plan("all_reduce", variants=Variants("all", "99")).reductions == ["sum", "max"]
    assert plan("all_reduce", ranks=5).chunks == [1]


@pytest.mark.parametrize(
    ("names", "changed", "message"),
    [
        (["gather"], {}, "unknown operation 'gather'"),
        ([], {}, "--experts 64: not divisible among 3 ranks"),
        (["flat"], {"tokens": Tokens(experts=6)}, "--top-k 8: more experts per token than there are"),
        (["flat"], {"tokens": Tokens("zipff", 6, 2)}, "--traffic 'zipff': expected uniform, zipf, local:F"),
        (
            ["flat"],
            {"tokens": Tokens("none.npy", 6, 2)},
            "--traffic none.npy: cannot be read: No such file",
        ),
        (["flat"], {"tokens": Tokens(experts=6, top_k=2), "chunks": "1,\N{SUPERSCRIPT TWO}"}, "--chunks"),
        (["all_reduce"], {"variants": Variants("prod")}, "--op prod: moeport reduces by sum and max; expected one"),
        (["all_reduce", "reduce_scatter"], {"variants": Variants("max")}, "--op max: reduce_scatter only sums"),
        (["broadcast"], {"variants": Variants(root="3")}, "--root 3: expected a rank from 0 to 2, or all"),
        (["broadcast"], {"variants": Variants(root="-1")}, "--root -1: expected a rank from 0 to 2, or all"),
        (["all_reduce"], {"target": Target(backend="numpy")}, "--backend numpy: expected torch or mindspore"),
        (["all_reduce"], {"target": Target(device="tpu")}, "--device tpu: expected auto, cpu, cuda, npu"),
        (["all_reduce"], {"target": Target(timeout=0.0)}, "--timeout 0: expected a number of seconds above 0"),
        (["all_reduce"], {"target": Target(timeout=float("nan"))}, "--timeout nan: expected a number of seconds"),
    ],
)
def test_what_is_used_is_checked(names, changed, message):
    with pytest.raises(UserError) as caught:
        plan(*names, **changed)
    assert str(caught.value).startswith(message)


def test_an_operation_is_timed_once_although_it_is_named_twice():
    assert plan("all_reduce", "all_reduce", *EXCHANGES, ranks=2).names == ["all_reduce", *EXCHANGES]


class Ranks:
    """Ranks of a job, one after the other; keeps what each gives to a collective."""

    def __init__(self, size):
        self.size, self.rank, self.given = size, 0, []

    def take(self, x, *rest):
        self.given.append(x)
        return x

    all_reduce = all_gather = reduce_scatter = broadcast = all_to_all = take


def prepared(name, size, dtype, bytes_, **variant):
    """The operation of the last rank, and what all ranks gave to it."""
    from moeport.backends.torch.ops import DTYPES, TorchOps

    torch = pytest.importorskip("torch")
    ranks: Any = Ranks(size)
    operation = None
    item = DTYPES[dtype].itemsize
    for ranks.rank in range(size):
        operation = collective(name, ranks, TorchOps(torch.device("cpu")), Elements(dtype, item, bytes_), **variant)
        operation.run()
    return operation, ranks.given


@pytest.mark.parametrize("size", [2, 21, 30, 129, 256])
@pytest.mark.parametrize("redop", ["sum", "max"])
def test_sums_of_many_ranks_are_exact_in_bfloat16_in_any_order(size, redop):
    operation, given = prepared("all_reduce", size, "bfloat16", 64, redop=redop)
    for order in (given, given[::-1], sorted(given, key=lambda x: float(x[0]))):
        result = order[0].clone()
        for x in order[1:]:
            result = result + x if redop == "sum" else result.maximum(x)
        assert operation.wrong(result) == 0
    assert result.float().max() > 0
    result[3] += 2
    result[5] = float("nan")
    assert operation.wrong(result) == 2


def test_sums_of_more_ranks_may_be_off_by_what_the_type_can_hold():
    operation, given = prepared("all_reduce", 400, "bfloat16", 64)
    result = given[0].clone()
    for x in given[1:]:
        result = result + x
    assert operation.wrong(result) == 0
    assert operation.wrong(result * 4) == len(result)
    assert sum_error(np.array([256, 257]), 3, "bfloat16").tolist() == [0.0, 257 / 256]
    assert sum_error(np.array([2**24]), 1000, "float32").tolist() == [0.0]


@pytest.mark.parametrize(
    ("name", "bytes_", "count"),
    [
        ("all_reduce", 4096, 1024),
        ("broadcast", 4096, 1024),
        ("sendrecv", 4096, 1024),
        ("all_gather", 4096, 256),
        ("reduce_scatter", 4096, 256),
        ("all_to_all", 4096, 256),
    ],
)
def test_elements_are_counted_as_in_nccl_tests(name, bytes_, count):
    """There, with 4 ranks and 4,096 bytes of float, all_gather prints count 256 and all_reduce 1,024."""
    operation, _ = prepared(name, 4, "float32", bytes_)
    assert (operation.bytes, operation.count) == (bytes_, count)


def test_the_root_that_broadcasts_is_said():
    assert prepared("broadcast", 3, "float32", 12, root=2)[0].root == 2
    assert prepared("all_reduce", 3, "float32", 12)[0].root == -1


def row(operation, busbw, wrong=0):
    values = dict.fromkeys(Row.__dataclass_fields__, 1) | {"operation": operation, "busbw": busbw, "wrong": wrong}
    return Row(**values)


def test_the_last_lines_are_those_of_nccl_tests():
    assert list(summary([row("all_reduce", 1.0), row("all_reduce", 2.0)])) == [
        "# Out of bounds values : 0 OK",
        "# Avg bus bandwidth    : 1.5",
    ]
    rows = [row("all_reduce", 1.0, wrong=3), row("flat", 2.5)]
    assert average_busbw(rows) == 1.75
    assert list(summary(rows)) == [
        "# Out of bounds values : 3 FAILED",
        "# Avg bus bandwidth    : 1.75",
        "#   all_reduce         : 1",
        "#   flat               : 2.5",
    ]
    assert next(summary([row("flat", 1.0, wrong=None)])) == "# values were not checked"


def test_memory_that_is_not_known_limits_nothing(monkeypatch):
    monkeypatch.setattr(options, "memory_bytes", lambda: None)
    assert Sizes("999999G", "999999G").values() == [999999 << 30]
