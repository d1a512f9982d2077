"""Functions stay short and take few parameters."""

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moeport"
MOST_LINES = 60
"""Of a function, from `def` to its end, docstring and parameters included."""
MOST_PARAMETERS = 12
"""Of a function; options of a command come in groups, see `moeport.cli.options.grouped`. Constants of a Triton kernel
do not count: they choose among its compiled forms.
"""


@functools.cache
def functions():
    """File and syntax tree of every function of the package."""
    return [
        (str(path.relative_to(PACKAGE)), node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]


def too_long(node):
    return node.end_lineno - node.lineno + 1 > MOST_LINES


def too_many(node):
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    constants = [x for x in arguments if x.annotation and ast.unparse(x.annotation) == "tl.constexpr"]
    return len(arguments) - len(constants) > MOST_PARAMETERS


def test_no_function_is_long():
    assert [(file, node.name) for file, node in functions() if too_long(node)] == []


def test_no_function_has_many_parameters():
    assert [(file, node.name) for file, node in functions() if too_many(node)] == []


@pytest.mark.parametrize(("lines", "parameters", "long", "many"), [(58, 12, False, False), (60, 13, True, True)])
def test_what_the_limits_catch(lines, parameters, long, many):
    names = ", ".join(f"x{i}" for i in range(parameters))
    (node,) = ast.parse(f'def f({names}):\n    """Text."""\n' + "    pass\n" * lines).body
    assert (too_long(node), too_many(node)) == (long, many)


def test_constants_of_a_kernel_do_not_count():
    names = ", ".join(f"x{i}" for i in range(12))
    (node,) = ast.parse(f"def f({names}, BLOCK: tl.constexpr): pass").body
    assert not too_many(node)
