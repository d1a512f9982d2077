import pytest

from moeport.core.ops import FLOAT_DTYPES, KERNELS, PRIMITIVES
from tests.conformance import kernels, primitives
from tests.conformance.targets import TOLERANCE, every_form
from tests.support import assert_close

CASES = [*primitives.CASES, *kernels.CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
@every_form
def test_operation_gives_its_formula(target, case):
    backend = target.build()
    got, want = case.outputs(backend.ops, *case.arguments(backend)), case.expected()
    assert len(got) == len(want)
    for x, expected in zip(got, want, strict=True):
        assert tuple(x.shape) == expected.shape
        if expected.dtype.kind == "f":
            least = "float32" if target.dtype == "bfloat16" and case.accurate else target.dtype
            assert backend.ops.dtype(x) == least
            assert_close(backend.ops.to_numpy(x), expected, TOLERANCE[target.dtype])
        else:
            assert backend.ops.dtype(x) not in FLOAT_DTYPES
            assert backend.ops.to_numpy(x).tolist() == expected.tolist()


def test_every_operation_has_a_case():
    assert {case.op for case in CASES} == {*PRIMITIVES, *KERNELS}
