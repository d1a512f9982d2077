"""Every fault that is put in is found, and the first line of the report names it."""

import pytest

from moeport.parity.isolate import isolate_operation
from moeport.parity.record import record
from moeport.parity.run import compare_subjects
from moeport.parity.text import markdown, render
from tests.parity.faults import FAULTS, with_fault
from tests.parity.tiny import subject

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


def sides(folder, fault):
    return with_fault(fault, lambda overrides: subject(folder, overrides=overrides))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_first_line_names_the_fault(folder, fault):
    report = compare_subjects(sides(folder, fault), steps=2)
    (found,) = report.comparisons
    assert found.headline.startswith(fault.says), found.headline
    for words in fault.others:
        assert words in found.headline
    assert (report.verdict, found.culprit.name in found.headline) == ("fail", True)
    assert found.headline in markdown(report)
    assert render(report).renderables[0].plain == found.headline


@pytest.mark.parametrize(
    "fault", [f for f in FAULTS if "its inputs agree (own error)" in f.others], ids=lambda f: f.name
)
def test_isolation_says_that_the_error_is_the_operations_own(folder, fault):
    (found,) = compare_subjects(sides(folder, fault), steps=0, isolate=True).comparisons
    assert found.culprit.isolation.own
    assert "on A's inputs it is off by" in found.headline
    assert "(own error)" in found.headline


def test_isolation_tells_an_inherited_error(folder):
    """With the fault before it, an operation gives A's result on A's inputs."""
    fault = next(f for f in FAULTS if f.name == "bfloat16 in one operation")
    a, b = sides(folder, fault)
    isolation = isolate_operation(a, b, record(a, steps=0), "layers.1/attention.out:linear")
    assert not isolation.own
    assert isolation.error == 0


def test_without_a_fault_nothing_is_found(folder):
    (found,) = compare_subjects([subject(folder), subject(folder)], steps=2).comparisons
    assert found.equal
    assert found.culprit is None
