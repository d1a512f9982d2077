"""The command `moeport`: its options, exit codes and error messages."""

import sys
import traceback
from importlib import import_module
from typing import Annotated, Any

import typer

from moeport.cli.options import expands_paths
from moeport.errors import MoeportError, UserError
from moeport.version import VERSION

COMMANDS = (
    "train",
    "launch",
    "compare",
    "generate",
    "capacity",
    "config",
    "routers",
    "doctor",
    "parity",
    "probe",
    "bench",
    "emulate",
    "plan",
)
"""Each command is a module of `moeport.cli` with a function of the same name, or with an `app` if it has subcommands.
README.md lists them."""

app = typer.Typer(
    name="moeport",
    help="Train mixture-of-experts language models from one YAML config.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _register(name: str) -> None:
    module = import_module(f"moeport.cli.{name}")
    if hasattr(module, "app"):
        for each in module.app.registered_commands:
            each.callback = expands_paths(each.callback)
        app.add_typer(module.app)
    else:
        app.command(name)(expands_paths(getattr(module, name)))


for _name in COMMANDS:
    _register(_name)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moeport {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. May appear anywhere on the line.")
    ] = False,
) -> None:
    pass


def _command() -> Any:
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

    Exit codes: 0 success; 2 an error that the user can fix, such as wrong usage; 1 any other failure; 130 interrupted.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        _command()(arguments, prog_name="moeport")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        elif isinstance(error, MoeportError):
            _print_error("error:", str(error))
        elif _out_of_memory(error):
            text = " ".join(str(error).split()) or "no details"
            _print_error("error:", f"out of memory: {text}. Choose smaller sizes or batches, or a larger machine")
        else:
            _print_error(
                "internal error:", f"{type(error).__name__}: {error}\nRun again with --debug for the traceback."
            )
        sys.exit(_exit_code(error))


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
