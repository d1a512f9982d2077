"""`moeport watch`."""

from pathlib import Path
from typing import Annotated

import typer


def watch(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders; the runs may still train.", show_default=False)
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 0,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; by default only this machine reaches it.")
    ] = "127.0.0.1",
) -> None:
    """Follow runs on a page in the browser while they train: loss, speed, time left, loads, drops, state.

    It prints the address of the page, which holds a random token, and serves it until Ctrl-C. It only reads the runs.
    """
    from moeport.pages.console import wide_console
    from moeport.studies.watch.followed import followed
    from moeport.studies.watch.parts import Page
    from moeport.studies.watch.server import WatchServer

    console = wide_console()
    with WatchServer(Page(followed(runs)), host, port) as server:
        console.print(f"watching {len(runs)} run{'s' if len(runs) > 1 else ''}: {server.address}", soft_wrap=True)
        if not server.is_local:
            console.print(
                "Whoever reaches this machine and knows the address can read the page, and nothing is encrypted; safer "
                f"from elsewhere: leave --host out and use ssh -L {server.server_port}:127.0.0.1:{server.server_port}",
                soft_wrap=True,
            )
        console.print("Ctrl-C ends it; the runs go on.")
        console.file.flush()
        server.serve_forever()
