"""What the documentation lists about every router."""

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

from moeport.cli.routers import experts_per_token, summary
from moeport.routers import BY_NAME

PAGE = Path(__file__).parents[1] / "routers.md"


def overview() -> str:
    """A table of all routers."""
    head = "| Router | Experts per token | What it does | Paper |\n|---|---|---|---|"
    return "\n".join([head, *map(_row, BY_NAME)])


def sentence() -> str:
    """The names of all routers."""
    causal = [name for name, router in BY_NAME.items() if not router.config_class.looks_ahead]
    others = [name for name in BY_NAME if name not in causal]
    text = f"The routers are {_listed(causal)}; for non-causal models also {_listed(others)}."
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def without_balance_loss() -> str:
    """The routers whose load-balancing loss is off by default."""
    names = _listed(name for name, router in BY_NAME.items() if not router.load_balance)
    text = f"The coefficient is 0 by default for {names}: they balance in another way, or have no scores to balance."
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _row(name: str) -> str:
    router = BY_NAME[name]
    has_section = f"\n## `{name}`\n" in PAGE.read_text(encoding="utf-8")
    target = f"#{name}" if has_section else f"configuration.md#modelmoerouter-name-{name}"
    experts = experts_per_token(router.config_class)
    experts = re.sub(r"\w*_\w+", r"`\g<0>`", experts)
    return f"| [`{name}`]({target}) | {experts} | {summary(router)} | {router.paper} |"


def _listed(names: Iterable[str]) -> str:
    *others, last = [f"`{name}`" for name in names]
    return f"{', '.join(others)} and {last}" if others else last
