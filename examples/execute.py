"""Run a notebook from its first cell to its last in a new kernel, and keep what it shows: `make notebook`.

Without `--output` the notebook itself is written. What names the machine and the time is left out.

    pip install -e '.[torch,plot,notebook]'
    python examples/execute.py examples/routers.ipynb
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

try:
    import nbformat
    from nbclient import NotebookClient
    from nbformat import NotebookNode
    from traitlets.config import Config
except ModuleNotFoundError as missing:
    print(f"error: {missing}; install what is needed with: pip install -e '.[torch,plot,notebook]'", file=sys.stderr)
    sys.exit(2)


def run(notebook: NotebookNode, parameters: str, seconds: int) -> None:
    """Fill in the outputs of all cells.

    Args:
        notebook: what is run.
        parameters: lines of Python that are run after the cell with the tag `parameters`; none of them stays.
        seconds: the most that the start or one cell may take.

    Raises nbclient.exceptions.CellExecutionError at the first cell that fails.
    """
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    stored = cell.source
    cell.source = f"{stored}\n{parameters}"
    with tempfile.TemporaryDirectory() as folder:
        # Through sockets in the folder: ports are open to everybody on the machine.
        config = Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}})
        place = {"metadata": {"path": folder}}
        limits = {"timeout": seconds, "startup_timeout": seconds}
        NotebookClient(notebook, resources=place, config=config, coalesce_streams=True, **limits).execute()
    cell.source = stored


PLACE = re.compile(r"&lt;div&gt;&lt;dt&gt;(?:started|command|host)&lt;/dt&gt;.*?&lt;/div&gt;\s*", re.DOTALL)
"""What the report of a run, in a frame, says of the time and the machine."""


def clean(notebook: NotebookNode) -> None:
    """Leave out what says when and where it was run."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", ()):
            if "text/html" in output.get("data", ()):
                output.data["text/html"] = PLACE.sub("", output.data["text/html"])


def main() -> None:
    """Run the notebook of the command line."""
    parser = argparse.ArgumentParser(description="Run a notebook in a new kernel and keep its outputs.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--output", type=Path, help="write here instead")
    parser.add_argument("--set", default="", metavar="LINES", help="Python that changes its parameters, as in steps=5")
    parser.add_argument("--seconds", type=int, default=900, help="the most that the start or one cell may take")
    options = parser.parse_args()
    try:
        notebook = nbformat.read(options.notebook, as_version=4)
    except (OSError, nbformat.reader.NotJSONError) as error:
        parser.error(f"{options.notebook}: is not a notebook that can be read: {error}")
    run(notebook, options.set, options.seconds)
    clean(notebook)
    nbformat.write(notebook, options.output or options.notebook)


if __name__ == "__main__":
    main()
