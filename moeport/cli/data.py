"""`moeport data`."""

from typing import Annotated

import typer

from moeport.cli.options import ConfigFile, Overrides
from moeport.cli.progress import FileProgress

app = typer.Typer(name="data", help="Prepare the data of a config ahead of training.", no_args_is_help=True)


@app.command("ingest")
def ingest(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Processes that encode text. Default: one per core.", show_default=False),
    ] = None,
) -> None:
    """Read, split and encode the data of a config into the cache, where training finds them.

    Memory does not depend on the size of the data. After an interruption, the same command continues.

    Example: moeport data ingest config.yaml --workers 16
    """
    from moeport.config import load_config
    from moeport.data import prepare_data
    from moeport.data.inspect import described
    from moeport.pages.console import wide_console

    console = wide_console()
    data = load_config(config, overrides or ()).data
    with FileProgress() as progress:
        prepare_data(
            data, report=lambda line: console.print(line, soft_wrap=True), progress=progress.add, workers=workers
        )
    for line in described(data):
        console.print(line, soft_wrap=True)


@app.command("show")
def show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Show what the cache holds of a config's data: documents, tokens and shards, or how much of them there is.

    Example: moeport data show config.yaml
    """
    from moeport.config import load_config
    from moeport.data.inspect import described
    from moeport.pages.console import wide_console

    console = wide_console()
    with FileProgress() as progress:
        lines = described(load_config(config, overrides or ()).data, progress.add)
    for line in lines:
        console.print(line, soft_wrap=True)
