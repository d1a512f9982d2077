"""Whether the programs of a command line exist, and moeport's options with them, without running it."""

import re
import shlex
from pathlib import Path
from typing import Any

import typer

from moeport.cli.main import whole_command

WRONG_USAGE: Any = typer.BadParameter.__base__
"""typer has a click of its own in some releases, and uses the package in others."""
NAME = "tests/docs/lines.py"
REPOSITORY = Path(__file__).parents[2]
ELSEWHERE = {
    "docker": "containers",
    "git": "the checkout",
    "hf": "models of the hub",
    "jupyter": "notebooks",
    "kubectl": "Kubernetes",
    "make": "a checkout",
    "mlflow": "the extra of that name",
    "mpirun": "Open MPI",
    "pip": "packages",
    "podman": "containers",
    "sbatch": "Slurm",
    "source": "a virtual environment",
    "srun": "Slurm",
    "ssh": "another machine",
    "swanlab": "the extra of that name",
    "tensorboard": "the extra of that name",
    "wandb": "the extra of that name",
}
"""Programs that the pages call and no test runs, and what they are for: their blocks need a mark."""
HERE = {"cat", "cp", "cd", "echo", "head", "ls", "mkdir", "moeport", "msrun", "python", "sed", "tail", "torchrun"}
"""Programs that a test runs."""


def faults(line, is_run):
    """What is wrong with a command line, a sentence each.

    Args:
        is_run: whether a test runs it.
    """
    for words in _simple_commands(line):
        yield from _faults([word for word in words if not re.match(r"[A-Z_]+=", word)], is_run)


def _simple_commands(line):
    """The words of each command of a pipeline or list, without redirections."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=True)
    reader.whitespace_split, reader.commenters = True, "#"
    words = []
    for word in reader:
        if set(word) <= set("|&;()"):
            yield words
            words = []
        elif words and words[-1].startswith((">", "<")):
            words.pop()
        else:
            words.append(word)
    yield words


def _faults(words, is_run):
    if not words:
        return
    program = Path(words[0]).name
    if is_run and program in ELSEWHERE:
        yield f"{program} is for {ELSEWHERE[program]}: say above the block what it needs, or why it is not run"
    if program == "make":
        yield from (f"no target {each} in the Makefile" for each in words[1:] if "=" not in each and not _target(each))
    elif program not in HERE | ELSEWHERE.keys():
        yield f"{words[0]} is no program that the pages call; an entry of HERE or ELSEWHERE in {NAME} makes it one"
    if program == "moeport":
        yield from moeport_faults(words[1:])
    elif " -m moeport " in " ".join(words):
        yield from moeport_faults(words[words.index("moeport") + 1 :])


def _target(name):
    return re.search(rf"^{re.escape(name)}:", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def moeport_faults(words):
    """What is wrong with words behind `moeport`: a command, option or argument too many, too few or unknown."""
    command = whole_command()
    context = command.context_class(command, **command.context_settings)
    path, rest = ["moeport"], list(words)
    try:
        while True:
            values, rest, _ = command.make_parser(context).parse_args(rest)
            if not hasattr(command, "commands"):
                break
            if not rest:
                return
            if rest[0] not in command.commands:
                yield f"{' '.join(path)} has no command {rest[0]}"
                return
            command = command.commands[rest[0]]
            path.append(rest.pop(0))
            context = command.context_class(command, parent=context, **command.context_settings)
    except WRONG_USAGE as error:
        yield f"{' '.join(path)}: {error.format_message()}"
        return
    if not {"--help", "-h", "--version"} & set(words):
        yield from _argument_faults(" ".join(path), command, values, rest)
    if path[-1] == "emulate" and "--" in words:
        yield from moeport_faults(words[words.index("--") + 1 :])


def _argument_faults(path, command, values, rest):
    if rest:
        yield f"{path}: {rest[0]} is an argument too many"
    for each in command.params:
        if each.required and not values.get(each.name):
            yield f"{path}: {each.opts[0]} is missing"
