"""The command `moeport`: its options, exit codes and error messages."""

import sys
import traceback
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typing_extensions import override

from moeport.cli.options import expands_paths
from moeport.cli.streams import lasting_streams
from moeport.errors import MoeportError, UserError
from moeport.files import disk_error
from moeport.launch import last_words
from moeport.stopping import INTERRUPTED, Interruptible

COMMANDS = (
    "train",
    "launch",
    "report",
    "watch",
    "compare",
    "generate",
    "eval",
    "capacity",
    "inspect",
    "checkpoint",
    "convert",
    "data",
    "tokenizer",
    "config",
    "routers",
    "doctor",
    "kit",
    "parity",
    "probe",
    "bench",
    "emulate",
    "plan",
)
"""Each command is a module of `moeport.cli` with a function of the same name, or with an `app` if it has subcommands.
docs/commands.md lists them."""

LASTING = {"train", "watch", "compare", "launch", "emulate", "kit", "data"}
"""Commands that go on when nobody reads their output."""

ALONE = ("--version", "--install-completion", "--show-completion")
"""Options that print something and end moeport."""


class _Moeport(TyperGroup):
    """Refuses what stands behind an option that would end moeport before it is looked at."""

    @override
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] in ALONE and args[1:]:
            ctx.fail(f"{args[0]} takes no arguments; received {' '.join(args[1:])}")
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="moeport",
    cls=_Moeport,
    help="Train mixture-of-experts language models from one YAML config.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _register(name: str) -> None:
    module = import_module(f"moeport.cli.{name}")
    if hasattr(module, "app"):
        for each in filter(None, (module.app.registered_callback, *module.app.registered_commands)):
            each.callback = expands_paths(each.callback)
        app.add_typer(module.app)
    else:
        app.command(name)(expands_paths(getattr(module, name)))


for _name in COMMANDS:
    _register(_name)


def _print_version(wanted: bool) -> None:
    if wanted:
        from moeport.cli.versions import text

        typer.echo(text())
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the versions of moeport and of the frameworks, and exit.",
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. May appear anywhere on the line.")
    ] = False,
) -> None:
    pass


def whole_command() -> Any:
    """The whole command; help texts show a switch by its name alone, not as one that takes a value."""
    command = typer.main.get_command(app)
    _without_values(command, command.context_class(command, **command.context_settings))
    return command


def _without_values(command: Any, context: Any) -> None:
    for option in (*command.params, command.get_help_option(context)):
        if getattr(option, "is_flag", False):
            option.metavar = ""
    for each in getattr(command, "commands", {}).values():
        _without_values(each, each.context_class(each, parent=context))


def main() -> None:
    """Run the command of `sys.argv` and exit.

    Exit codes: 0 success; 2 an error that the user can fix, such as wrong usage; 1 any other failure; 130 interrupted
    by a signal; 141 the reader of its output has gone.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    goes_on = name in LASTING and not {"--help", "-h"} & {*arguments}
    with lasting_streams(goes_on), Interruptible() as interrupts:
        try:
            _run(arguments)
        except (KeyboardInterrupt, SystemExit) as ending:
            if interrupts.received is None and isinstance(ending, SystemExit):
                raise
            _print_error("error:", f"interrupted by {interrupts.received or 'SIGINT'}")
            sys.exit(INTERRUPTED)
        except Exception as raised:
            error = disk_error(raised) or raised
            if debug:
                traceback.print_exc()
            else:
                _explain(error)
            heading = "error" if isinstance(error, MoeportError) else f"internal error: {type(error).__name__}"
            last_words.leave(f"{heading}: {error}", _exit_code(error))
            sys.exit(_exit_code(error))


def _run(arguments: list[str]) -> None:
    """Run a command, and write out what it has printed."""
    try:
        whole_command()(arguments, prog_name="moeport")
    finally:
        sys.stdout.flush()


def _explain(error: Exception) -> None:
    if isinstance(error, MoeportError):
        _print_error("error:", str(error))
    elif _out_of_memory(error):
        text = " ".join(str(error).split()) or "no details"
        _print_error("error:", f"out of memory: {text}. Choose smaller sizes or batches, or a larger machine")
    else:
        _print_error("internal error:", f"{type(error).__name__}: {error}\nRun again with --debug for the traceback.")


def _exit_code(error: Exception) -> int:
    if isinstance(error, MoeportError):
        return error.exit_code
    return UserError.exit_code if _out_of_memory(error) else 1


def _out_of_memory(error: Exception) -> bool:
    """Whether Python, numpy or a framework got no memory; PyTorch says so in errors of several types."""
    name, text = type(error).__name__, str(error)
    return isinstance(error, MemoryError) or "OutOfMemory" in name or "can't allocate memory" in text


def _print_error(heading: str, message: str) -> None:
    from moeport.pages.console import PlainConsole

    console = PlainConsole(stderr=True, soft_wrap=True)
    console.print(heading, style="bold red", end="\n" if "\n" in message else " ")
    console.print(message)
