"""The order in which packages import each other, as pyproject.toml enforces it."""

import re
import tomllib
from pathlib import Path
from typing import Any

from figures.drawing import WIDTH, Drawing

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"
ROW, BOX, TOP = 36, 26, 46
NEUTRAL = "model"
"""The highest package that knows no framework; docs/architecture.md says so of everything from it down."""


def layers() -> str:
    """A row per layer, the top one first; packages that may hold code of a framework stand out."""
    contracts: list[dict[str, Any]] = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (rows,) = (each["layers"] for each in contracts if each["type"] == "layers")
    (allowed,) = (
        each["allowed_importers"]
        for each in contracts
        if each["type"] == "protected" and "torch" in each["protected_modules"]
    )
    frameworks = {module.split(".")[1] for module in allowed}
    drawing = Drawing("The layers of moeport: a package imports those below it", TOP + ROW * len(rows) + 62)
    drawing.text(WIDTH / 2, 28, "a package imports those below it, never those above", "small muted")
    neutral = False
    for number, row in enumerate(rows):
        y = TOP + ROW * number
        names = re.findall(r"\w+", row)
        if NEUTRAL in names:
            neutral = True
            drawing.line([(16, y - 5), (WIDTH - 16, y - 5)], "line dashed")
        signs = re.findall(r"[|:]", row)
        widths = [8.2 * len(name) + 18 for name in names]
        x = (WIDTH - sum(widths) - 14 * len(signs)) / 2
        for place, (name, width) in enumerate(zip(names, widths, strict=True)):
            if place:
                drawing.text(x - 7, y + 18, signs[place - 1], "muted")
            kind = "orange" if name in frameworks else "blue" if neutral else "plain"
            drawing.box(x, y, width, BOX, kind)
            drawing.text(x + width / 2, y + 18, name, "package")
            x += width + 14
    y = TOP + ROW * len(rows) + 10
    for kind, words in (
        ("orange", "may import PyTorch or MindSpore, in their adapters alone"),
        ("blue", "neutral: knows no framework and no backend"),
    ):
        drawing.box(28, y, 14, 14, kind, 3)
        drawing.text(50, y + 12, words, "small left")
        y += 21
    return drawing.svg()
