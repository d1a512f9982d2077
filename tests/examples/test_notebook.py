"""The notebook in examples/ runs in a real kernel, and is stored as such a run left it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import ipykernel  # noqa: F401
import matplotlib  # noqa: F401
import nbclient  # noqa: F401
import nbformat
import pytest
import torch  # noqa: F401

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples/routers.ipynb"
KINDS = {"image/png": 2, "text/html": 1, "text/markdown": 1}
"""What the notebook shows: two figures, the report of a run, and a table."""


def shown(notebook):
    """How many outputs there are of each kind that is no plain text."""
    kinds = [kind for cell in code(notebook) for output in cell.outputs for kind in output.get("data", ())]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds) - {"text/plain"})}


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(parameters, folder):
    """Run the notebook as `make notebook` does, into another file."""
    own = {name: str(folder / name) for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR", "XDG_CACHE_HOME")}
    command = [sys.executable, "examples/execute.py", str(NOTEBOOK), "--output", str(folder / "run.ipynb")]
    environment = os.environ | own | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--set", parameters], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return nbformat.read(folder / "run.ipynb", as_version=4)


def test_it_runs_shortened(tmp_path):
    run = execute("steps = 2; routers.pop('sigmoid_bias'); routers.pop('topk, no loss')", tmp_path)
    assert shown(run) == KINDS
    assert [cell.source for cell in run.cells] == [cell.source for cell in nbformat.read(NOTEBOOK, 4).cells]
    (table,) = [output.data["text/markdown"] for cell in code(run) for output in cell.outputs if has_table(output)]
    assert re.findall(r"^\| (\w[^|]*) \|", table, re.MULTILINE) == ["router", "topk", "switch, capacity 1"]


def has_table(output):
    return "text/markdown" in output.get("data", ())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_runs_whole_and_shows_what_its_text_says(tmp_path):
    check_claims(execute("", tmp_path))


def test_the_stored_one_shows_what_its_text_says():
    check_claims(nbformat.read(NOTEBOOK, as_version=4))


def check_claims(notebook):
    """Imbalance falls with a loss or a bias and is above 2 without, no expert dies, and only the capacity drops."""
    (table,) = [output.data["text/markdown"] for cell in code(notebook) for output in cell.outputs if has_table(output)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    imbalance = {name: float(value) for name, _, _, value, *_ in rows}
    assert imbalance["topk"] < 2 < imbalance["topk, no loss"]
    assert imbalance["sigmoid_bias"] < 2
    assert {dead for *_, dead, _ in rows} == {"0.0 of 16"}
    dropped = {name: float(value.rstrip("%")) for name, *_, value in rows}
    assert {name for name, share in dropped.items() if share > 0} == {"switch, capacity 1"}


def test_it_is_stored_with_the_outputs_of_one_whole_run():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert shown(notebook) == KINDS
    assert {output.output_type for cell in code(notebook) for output in cell.outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }


def test_it_is_stored_without_names_of_a_machine():
    text = json.dumps(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    assert re.findall(r"(?:/home|/root|/tmp|/usr|/opt|/Users|site-packages)[/\w.-]*", text) == []
    assert re.findall(r"&lt;dt&gt;(?:host|command|started)&lt;", text) == []
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert notebook.metadata.language_info == {"name": "python"}
    assert all("execution" not in cell.metadata for cell in notebook.cells)
