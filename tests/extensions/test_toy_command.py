"""A command is a module, an entry in the table of commands and a row in docs/commands.md: three places."""

from tests.extensions.copies import Row, extended_copy

COMMAND = '''
"""`moeport greet`."""

from typing import Annotated

import typer


def greet(name: Annotated[str, typer.Argument(help="Whom.")], loud: Annotated[bool, typer.Option("--loud")] = False):
    """Greet somebody."""
    typer.echo(f"HELLO {name}" if loud else f"hello {name}")
'''
ENTRY = Row("moeport/cli/main.py", '"plan",', '    "greet",')
LISTED = Row(
    "docs/commands.md",
    "| `moeport doctor` | List the backends, devices, compute types and kernels of this machine. |",
    "| `moeport greet NAME` | Greet somebody. |",
)
TEST = "tests/cli/test_commands.py"


def test_a_command_is_three_places(tmp_path):
    copy = extended_copy(tmp_path, {"moeport/cli/greet.py": COMMAND}, (ENTRY, LISTED))
    assert copy.places == 3
    assert copy.moeport("greet", "you", "--loud").stdout == "HELLO you\n"
    assert "Greet somebody." in copy.moeport("--help").stdout
    assert copy.moeport("greet").returncode == 2
    done = copy.pytest(TEST)
    assert done.returncode == 0, done.stdout


def test_a_command_that_the_page_leaves_out_is_found(tmp_path):
    copy = extended_copy(tmp_path, {"moeport/cli/greet.py": COMMAND}, (ENTRY,))
    done = copy.pytest(TEST)
    assert done.returncode == 1
    assert "test_the_page_lists_every_command" in done.stdout
