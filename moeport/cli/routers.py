"""`moeport routers`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from moeport.routers.base import Router, RouterConfig


def routers(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show only this router, in full.", show_default=False)
    ] = None,
) -> None:
    """List the routers and their options."""
    from moeport.errors import UserError, choices
    from moeport.pages.console import wide_console
    from moeport.routers import BY_NAME

    console = wide_console()
    if name is None:
        console.print(_overview())
        console.print("\nOptions", style="bold")
        for each in BY_NAME:
            if (table := _options(each)).rows:
                console.print(each, table, sep="\n")
    elif name in BY_NAME:
        router = BY_NAME[name]
        console.print(name, style="bold")
        console.print(inspect.cleandoc(router.__doc__ or ""))
        console.print(f"\nExperts per token: {experts_per_token(router.config_class)}\nPaper: {router.paper}\n")
        table = _options(name)
        console.print(table if table.rows else "No options.")
    else:
        raise UserError(f"no router {name}; {choices(name, BY_NAME)}")


def _overview() -> Table:
    from rich.table import Table

    from moeport.routers import BY_NAME

    table = Table(title="Routers", title_justify="left")
    table.add_column("Router", no_wrap=True)
    table.add_column("Experts per token", overflow="fold")
    table.add_column("What it does, and its paper", overflow="fold")
    for name, router in BY_NAME.items():
        table.add_row(name, experts_per_token(router.config_class), f"{summary(router)}\n{router.paper}")
    return table


def _options(name: str) -> Table:
    """The options of a router, their defaults and what they do."""
    from rich.table import Table

    from moeport.routers import BY_NAME

    table = Table.grid(padding=(0, 2, 0, 0))
    for no_wrap in (True, True, False):
        table.add_column(no_wrap=no_wrap, overflow="fold")
    for option, field in BY_NAME[name].config_class.model_fields.items():
        if option != "name":
            table.add_row(f"  {option}", f"= {_shown(field.default)}", field.description or "")
    return table


def summary(router: type[Router[Any]]) -> str:
    """The first line of the config's docstring."""
    return inspect.cleandoc(router.config_class.__doc__ or "").partition("\n")[0]


def experts_per_token(config: type[RouterConfig]) -> str:
    """The option that sets the number of experts per token, or the number itself."""
    for option in ("top_k", "mean_experts"):
        if option in config.model_fields:
            return f"up to {option}" if config.may_use_fewer else option
    return str(config.model_validate({}).experts_per_token)


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
