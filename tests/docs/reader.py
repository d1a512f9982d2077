"""Does what a page says, in a folder: writes its files, runs its commands, and compares what they print.

What a page shows must be what is printed, with these exceptions: white space and the lines that draw tables are not
compared, nor a backslash with which the page continues a line; `...` stands for anything; and below the mark `numbers
vary` any number stands for any other, a time such as 1m30s too. A command ends with exit code 0, with 2 where the page
shows a line that begins with `error:`, and otherwise with the code that the page shows behind `$ echo $?`. A command
whose output a page does not show may print anything.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from moeport.cli.main import main
from tests.docs.blocks import commands

REPOSITORY = Path(__file__).parents[2]
CHECKOUT = ("benchmarks", "configs", "docs", "examples", "Makefile", "README.md")
"""What a reader has in the folder."""
TEXTS = ("capacity", "compare", "data", "inspect", "planner", "ranks", "routers", "training")
"""Pages that stand for a reader's own text, in `corpus/`."""
NUMBER = re.compile(r"(?:\d+h)?(?:\d+m)?\d+s\b|[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
STARTS_PROCESSES = ("emulate", "launch", "doctor")
"""Commands whose processes write to the descriptors themselves."""
SHELL = re.compile(r"[|<>;&*$~`]")
DRAWN = re.compile(r"[\s\u2500-\u257f]+")
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


class Reader:
    """Reads one page.

    Args:
        folder: an empty folder, which is the working directory.
    """

    def __init__(self, folder):
        self._names = {"__name__": "__main__"}
        for name in CHECKOUT:
            if (REPOSITORY / name).is_dir():
                shutil.copytree(REPOSITORY / name, folder / name)
            elif (REPOSITORY / name).exists():
                shutil.copy(REPOSITORY / name, folder / name)
        (folder / "corpus").mkdir()
        for name in TEXTS:
            text = (REPOSITORY / "docs" / f"{name}.md").read_text(encoding="utf-8")
            (folder / "corpus" / f"{name}.txt").write_text(text, encoding="utf-8")

    def do(self, block):
        """Do what one block says."""
        if block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "console":
            self._run(block, list(commands(block)))
        elif block.language == "yaml":
            Path("page.yaml").write_text(block.text, encoding="utf-8")
            code, printed = in_process("config", "check", "page.yaml")
            assert code == 0, f"{block.place}: not a config: {printed}"
        elif block.language == "python":
            with kept_output(errors=False) as printed:
                exec(compile(block.text, block.place, "exec"), self._names)
            if block.output is not None:
                compare(block, block.place, block.output, text_of(printed))

    def _run(self, block, lines):
        code = None
        for command, following in zip(lines, [*lines[1:], None], strict=True):
            if command.line == "echo $?":
                assert str(code) == command.shown.strip(), f"{command.place}: the exit code is {code}"
                continue
            code, printed = run(command.line)
            if not (following and following.line == "echo $?"):
                expected = 2 if re.search(r"^error:", command.shown, re.MULTILINE) else 0
                assert code == expected, f"{command.place}: exit code {code} of: {command.line}\n{printed}"
            if command.shown:
                compare(block, f"{command.place}: {command.line}", command.shown, printed)


def run(line):
    """Exit code and output of a command line; in this process where that is possible, to import frameworks once."""
    if not SHELL.search(QUOTED.sub("", line)):
        words = shlex.split(line, comments=True)
        if words[0] == "moeport" and words[1] not in STARTS_PROCESSES:
            return in_process(*words[1:])
        if words[0] == "python" and len(words) == 2 and words[1].endswith(".py"):
            with kept_output() as printed:
                runpy.run_path(words[1], run_name="__main__")
            return 0, text_of(printed)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY)}
    script = f'moeport() {{ python -m moeport "$@"; }}\n{line}'
    done = subprocess.run(
        ["bash", "-c", script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def in_process(*arguments):
    """Exit code and output of `moeport` with these arguments."""
    before, sys.argv = sys.argv, ["moeport", *arguments]
    code: str | int = 0
    with kept_output() as printed:
        try:
            main()
        except SystemExit as ending:
            code = ending.code or 0
        finally:
            sys.argv = before
    return code, text_of(printed)


@contextlib.contextmanager
def kept_output(errors=True):
    """In the block, what is printed is kept, also what is written as bytes; with `errors`, standard error too."""
    kept = io.BytesIO()
    stream = io.TextIOWrapper(kept, encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream if errors else sys.stderr):
        yield kept
    stream.detach()


def text_of(kept):
    return kept.getvalue().decode("utf-8", errors="replace")


def compare(block, place, shown, printed):
    """Fail unless a page shows what was printed."""
    assert agrees(shown, printed, "numbers vary" in block.marks), f"{place}\nshows:\n{shown}\nbut prints:\n{printed}"


def agrees(shown, printed, numbers_vary):
    """Whether a page shows what was printed, by the rule of this module."""
    printed, position = DRAWN.sub(" ", printed).strip(), 0
    parts = [DRAWN.sub(" ", part).strip() for part in shown.replace("\\\n", "\n").split("...")]
    for index, part in enumerate(parts):
        pattern = re.compile(_pattern(part, numbers_vary) + (r"\Z" if index == len(parts) - 1 else ""))
        found = pattern.search(printed, position) if index else pattern.match(printed)
        if not found:
            return False
        position = found.end()
    return True


def _pattern(text, numbers_vary):
    if not numbers_vary:
        return re.escape(text)
    pieces = [re.escape(piece) for piece in NUMBER.split(text)]
    return f"(?:{NUMBER.pattern})".join(pieces)
