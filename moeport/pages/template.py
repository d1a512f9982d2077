"""Loading the templates of pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"


def load_template(
    name: str, *folders: Path, filters: Mapping[str, Callable[..., Any]] | None = None
) -> jinja2.Template:
    """Loads a template from `folders`, or else from this package; templates in `folders` may extend those here."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(filters or {})
    return environment.get_template(name)
