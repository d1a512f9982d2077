"""The commit hooks are `make lint`, without the documentation."""

import re
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[2]


def test_the_hooks_run_what_make_lint_runs():
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    linted = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    assert [hook["entry"] for hook in hooks] == [command for command in linted if "mkdocs" not in command]
