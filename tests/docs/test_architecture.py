"""docs/architecture.md shows the import order that pyproject.toml enforces, and describes each package."""

import re
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
LAYERS = PAGE.partition("## Layers\n")[2].partition("\n## ")[0]


def contract(name):
    """The import contract with this name, from pyproject.toml."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    (found,) = [each for each in settings["tool"]["importlinter"]["contracts"] if each["name"] == name]
    return found


def drawn():
    """The rows of the picture, top to bottom: packages from left to right, and the signs between them."""
    (name,) = re.findall(r"\]\((images/layers\.svg)\)", LAYERS)
    texts = ElementTree.parse(REPOSITORY / "docs" / name).iter("{http://www.w3.org/2000/svg}text")
    rows = {}
    for text in texts:
        if text.get("class") == "package" or text.text in ("|", ":"):
            rows.setdefault(float(text.get("y")), []).append((float(text.get("x")), text.text))
    return [" ".join(words for _, words in sorted(row)) for _, row in sorted(rows.items())]


def test_the_picture_is_the_import_order():
    assert drawn() == contract("Packages import one way")["layers"]


def test_the_table_describes_each_package_once_in_the_drawn_order():
    described = re.findall(r"^\| `(\w+)` \| .+ \|$", LAYERS, re.MULTILINE)
    assert described == re.findall(r"\w+", " ".join(drawn()))


def test_each_package_is_drawn_and_each_drawn_one_exists():
    modules = {path.name.removesuffix(".py") for path in (REPOSITORY / "moeport").iterdir() if is_module(path)}
    assert modules == set(re.findall(r"\w+", " ".join(drawn())))


def is_module(path):
    """Whether a path in moeport/ is a package or module with a place in the order."""
    if path.name.startswith("__"):
        return False
    return path.suffix == ".py" or (path / "__init__.py").is_file()


def test_what_the_page_says_about_frameworks_is_the_contract():
    allowed = contract("Frameworks are imported by their adapter alone")["allowed_importers"]
    assert allowed == ["moeport.backends.*.*", "moeport.torch"]
    assert "`moeport/backends/torch` and `moeport/torch` only" in LAYERS


DEVICES = re.compile(r"(?<![a-z])(npu|ascend|cann|hccl|huawei|cuda|nccl|nvidia|mccl|mps|xpu)s?(?![a-z])", re.IGNORECASE)
"""As words, or as parts of a name between underscores."""


@pytest.mark.parametrize("package", ["core", "model", "routers", "comm"])
def test_neutral_code_names_no_device(package):
    """In no name, string or comment: what a device needs is the business of its adapter."""
    files = sorted((REPOSITORY / "moeport" / package).rglob("*.py"))
    assert len(files) > 5
    named = [
        f"{file.relative_to(REPOSITORY)}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if DEVICES.search(line)
    ]
    assert named == []


def test_torch_npu_is_for_the_adapter_of_torch():
    found = contract("torch_npu is imported by the adapter of torch alone")
    assert (found["source_modules"], found["forbidden_modules"]) == (["moeport"], ["torch_npu"])
    assert found["ignore_imports"] == ["moeport.backends.torch.** -> torch_npu"]
