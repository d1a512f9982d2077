"""Names of frameworks that are not public stand in one table per framework, and a missing one is named."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import moeport
from moeport.backends.examine import examine
from moeport.backends.private import missing
from moeport.errors import BackendUnavailableError

PACKAGE = Path(moeport.__file__).parent
FRAMEWORKS = ("torch", "mindspore")
OF_NAMED_TUPLES = {"_replace", "_fields", "_asdict", "_make"}


def table(framework):
    pytest.importorskip(framework)
    return importlib.import_module(f"moeport.backends.{framework}.private")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_installed_release_has_every_name(framework):
    assert missing(table(framework).NAMES) == []


def test_missing_names_are_found_at_every_depth():
    assert missing(["json:decoder.JSONDecoder.decode", "json:loads"]) == []
    wrong = ["no_such_module:name", "json:no_such_name", "json:decoder.no_such_name", "json.no_such:name"]
    assert missing(["json:loads", *wrong]) == wrong


@pytest.mark.parametrize(
    ("framework", "module", "name", "use"),
    [
        ("torch", "torch.autograd", "_profiler_enabled", "sees that a profile is written"),
        ("mindspore", "mindspore.graph.jit_trace", "_get_caller_lines", "looks up source lines, which is left out"),
    ],
)
def test_a_removed_name_is_named_with_its_use(framework, module, name, use, monkeypatch):
    private = table(framework)
    monkeypatch.delattr(importlib.import_module(module), name)
    assert missing(private.NAMES) == [f"{module}:{name}"]
    with pytest.raises(BackendUnavailableError) as caught:
        importlib.reload(private)
    message = str(caught.value)
    version = importlib.import_module(framework).__version__
    assert f" {version} lacks 1 of the {len(private.NAMES)} names that moeport uses although" in message
    assert f"not public: {module}.{name} ({use}); expected a release" in message


def test_the_doctor_says_which_name_is_gone(monkeypatch):
    """Where the adapter is imported for the first time."""
    monkeypatch.delitem(sys.modules, table("torch").__name__)
    monkeypatch.delitem(sys.modules, "moeport.backends.torch.backend", raising=False)
    monkeypatch.delattr(importlib.import_module("torch.autograd"), "_profiler_enabled")
    assert "torch.autograd._profiler_enabled (sees that a profile is written)" in examine("torch", "torch")["problem"]


def private(name):
    return name.startswith("_") and not name.startswith("__")


def own_names(trees):
    """Private names that moeport itself gives to functions, variables and attributes."""
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node, ast.Attribute) else node.id


def foreign(tree, own):
    """What a file uses of other packages that is not public."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            yield node.attr
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("moeport"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            yield from (name for name in names if private(name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and private(name.value) and name.value not in own:
                yield name.value


def test_nothing_else_uses_private_names():
    """Where frameworks are imported: in their adapters, and in moeport.torch."""
    files = [path for part in ("backends", "torch") for path in (PACKAGE / part).rglob("*.py")]
    trees = {path.relative_to(PACKAGE): ast.parse(path.read_text()) for path in files}
    own = {*own_names(trees.values()), *OF_NAMED_TUPLES}
    used = {str(path): found for path, tree in trees.items() if (found := sorted({*foreign(tree, own)}))}
    tables = {str(Path("backends") / name / "private.py") for name in FRAMEWORKS}
    assert tables <= used.keys()
    assert {path: names for path, names in used.items() if path not in tables} == {}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_private_name_in_use_stands_in_the_table(framework):
    listed = " ".join(table(framework).NAMES)
    tree = ast.parse((PACKAGE / "backends" / framework / "private.py").read_text())
    strings = {"_is_replica"}  # an attribute that torch gives to replicas alone
    assert {name for name in foreign(tree, set()) if name not in listed} <= strings
