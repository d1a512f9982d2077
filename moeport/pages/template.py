"""Pages made from templates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2

TEMPLATES = Path(__file__).parent / "templates"


def load_template(
    name: str, *folders: Path, filters: Mapping[str, Callable[..., Any]] | None = None
) -> jinja2.Template:
    """A page of the folder `templates`, or of other folders, whose pages may use what is there."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(filters or {})
    return environment.get_template(name)
