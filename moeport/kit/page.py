"""A file of the kit as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from moeport.kit.read import KitFile
from moeport.kit.text import facts, headline
from moeport.pages.template import load_template


def page(kit: KitFile) -> str:
    """The page: verdicts, then each part with its figures, tables and log."""
    results = kit.results
    template = load_template("kit.html", Path(__file__).parent / "templates")
    return template.render(headline=headline(results), facts=list(facts(results)), results=results, files=kit.files)
