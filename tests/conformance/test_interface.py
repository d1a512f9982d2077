import ast
import inspect
from pathlib import Path

import pytest

import moeport
from moeport.backends.numpy_ref.ops import NumpyOps
from moeport.core.ops import KERNELS, PRIMITIVES, Ops
from moeport.facts import BACKENDS
from tests.conformance.targets import TARGETS, every_form

DERIVED = {"accurate", "constant_like", "fetch", "fuses", "on_host", "part", "unrecorded"}
"""Methods of Ops that are neither primitives nor kernels: shorthands, marks, and what a backend may say of itself."""


def public(cls):
    return {name for name in dir(cls) if not name.startswith("_")}


def shape_of(signature):
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


def used_operations(path):
    """Attributes of anything called `ops` in a source file."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ops"
    }


def test_every_backend_is_a_target():
    assert {target.backend for target in TARGETS} == set(BACKENDS)


def test_operations_are_primitives_kernels_or_shorthands():
    assert public(Ops) == {*PRIMITIVES, *KERNELS, *DERIVED}


@pytest.mark.parametrize("name", sorted({*PRIMITIVES, *KERNELS, *DERIVED}))
@every_form
def test_override_has_the_signature_of_the_interface(target, name):
    ops = target.build().ops
    assert shape_of(inspect.signature(getattr(type(ops), name))) == shape_of(inspect.signature(getattr(Ops, name)))


def test_neutral_code_uses_nothing_beyond_the_interface():
    root = Path(moeport.__path__[0])
    used = {
        name
        for package in ("core", "model", "routers")
        for path in sorted((root / package).glob("*.py"))
        for name in used_operations(path)
    }
    assert "grouped_mlp" in used
    assert used <= public(Ops)


def test_the_reference_replaces_no_kernel():
    assert [name for name in (*KERNELS, "constant_like") if name in vars(NumpyOps)] == []


@every_form
def test_backend_says_what_it_is(target):
    backend = target.build()
    assert (backend.name, backend.dtype) == (target.backend, target.dtype)
    assert backend.device.split()[0] == target.device
    assert backend.parameter_dtype == ("float64" if target.dtype == "float64" else "float32")
    assert set(backend.kernel_choices()) - {"adamw"} == set(KERNELS)
    assert backend.versions().keys() >= {target.backend}
