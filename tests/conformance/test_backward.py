import pytest

from moeport.conformance.check import CASES, check_gradients
from tests.conformance.targets import every_form_that_trains


@pytest.mark.parametrize("case", [case for case in CASES if case.variables], ids=str)
@every_form_that_trains
def test_gradient_is_that_of_finite_differences(target, case):
    found = check_gradients(case, target.build())
    assert found.problem is None, found.problem
