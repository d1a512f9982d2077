import pytest

from moeport.conformance.check import CASES, check_values
from moeport.core.ops import KERNELS, PRIMITIVES
from tests.conformance.targets import every_form


@pytest.mark.parametrize("case", CASES, ids=str)
@every_form
def test_operation_gives_its_formula(target, case):
    found = check_values(case, target.build())
    assert found.problem is None, found.problem


def test_every_operation_has_a_case():
    assert {case.op for case in CASES} == {*PRIMITIVES, *KERNELS}
