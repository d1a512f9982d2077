"""`moeport inspect` as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from moeport.files import write_text
from moeport.pages.lines import colours
from moeport.pages.template import load_template
from moeport.studies.inspect.figures import sections
from moeport.studies.inspect.inspect import Found
from moeport.studies.inspect.text import headlines, layer_table, lines

PAGE_FILE = "inspect.html"


def write_page(found: Found, path: Path) -> None:
    """Write the page. Raises WriteError."""
    made = sections(found)
    labels = dict.fromkeys(line.label for each in made for drawn in each.listed for line in drawn.chart.lines)
    layers = [layer.name for layer in found.layers if layer.name in labels]
    page = load_template("inspect.html").render(
        name=found.place.resolve().name,
        about=lines(found),
        notes=found.notes,
        headlines=headlines(found),
        layers=layer_table(found),
        sections=made,
        colours=colours(layers) | colours([label for label in labels if label not in layers]),
    )
    write_text(path, page)
