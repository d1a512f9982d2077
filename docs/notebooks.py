"""A Jupyter notebook as a page: its texts, its code, and what the stored run showed."""

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any


def page(path: Path) -> str:
    """The Markdown of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [part for cell in cells for part in _parts(cell)]
    return "\n\n".join([parts[0], f"[Download this notebook]({path.name}).", *parts[1:]]) + "\n"


def _parts(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        if "text" in output:
            yield f"```text\n{''.join(output['text'])}```"
        else:
            yield _shown(output["data"], cell["metadata"].get("alt", ""))


def _shown(data: dict[str, Any], alt: str) -> str:
    """The best of the forms in which a result is stored."""
    if "image/png" in data:
        image = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="{escape(alt)}" src="data:image/png;base64,{image}">'
    if "text/html" in data:  # an empty line would end the HTML of a page
        return "".join(data["text/html"]).replace("\n", "&#10;")
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    return f"```text\n{''.join(data['text/plain'])}\n```"
