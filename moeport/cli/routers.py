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
    from rich.console import Console

    from moeport.errors import UserError
    from moeport.routers import ROUTERS

    console = Console(highlight=False)
    if name is None:
        console.print(_overview())
        console.print(_options(list(ROUTERS)))
    elif name in ROUTERS:
        router = ROUTERS[name]
        console.print(name, style="bold")
        console.print(inspect.cleandoc(router.__doc__ or ""), markup=False)
        experts = experts_per_token(router.config_class)
        console.print(f"\nExperts per token: {experts}\nPaper: {router.paper}\n", markup=False)
        table = _options([name])
        console.print(table if table.rows else "No options.")
    else:
        raise UserError(f"no router {name}; expected one of {', '.join(ROUTERS)}")


def _overview() -> Table:
    from rich.table import Table

    from moeport.routers import ROUTERS

    table = Table("Router", "Experts per token", "What it does", "Paper", title="Routers", title_justify="left")
    for name, router in ROUTERS.items():
        table.add_row(name, experts_per_token(router.config_class), summary(router), router.paper)
    return table


def _options(names: list[str]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from moeport.routers import ROUTERS

    table = Table("Router", "Option", "Default", "What it does", title="Options", title_justify="left")
    for name in names:
        for option, field in ROUTERS[name].config_class.model_fields.items():
            if option != "name":
                table.add_row(name, option, _shown(field.default), escape(field.description or ""))
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
    return str(value).lower() if isinstance(value, bool) else str(value)
