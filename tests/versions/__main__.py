"""Tries releases of Python, PyTorch and numpy: `make versions`, or

    python -m tests.versions [NAME ...] [--checks quick|check] [--resolve-only] [--keep] [--folder F] [--python P ...]

Each combination is resolved by pip. Those that resolve, and for whose Python there is an interpreter, each get an
environment, in which the checks run and which is then deleted. Results go into docs/versions.json, of which `make
generate` makes the tables in docs/versions.md; combinations that are not tried keep their results. pip reads its
options, such as another index, from its environment variables. Exit code 1: a check failed.
"""

import argparse
import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from tests.versions.combinations import CHECKS, COMBINATIONS, ROOT
from tests.versions.environments import installed_in, interpreter, make, resolve, run, version_of

RECORD = ROOT / "docs" / "versions.json"
UNREAD = ":!docs/versions.json"
"""What git does not look at: the record, which is written meanwhile."""


def tried(combination, options):
    """The entry of a combination in the record."""
    python = interpreter(combination.python, options.python)
    entry = {"python": combination.python, "torch": combination.torch, "numpy": combination.numpy}
    entry |= {"date": f"{datetime.now(UTC):%Y-%m-%d}", "interpreter": python and version_of(python)}
    versions, reason = resolve(combination, python)
    entry |= {"versions": versions, "reason": reason}
    if reason or options.resolve_only or python is None:
        return entry
    checks, folder = CHECKS[options.checks], options.folder / combination.name
    try:
        if reason := make(combination, python, folder, checks.requirements(combination.numpy)):
            return {**entry, "versions": {}, "reason": reason}
        entry |= {"versions": installed_in(folder), "checks": options.checks, "commit": commit()}
        return entry | run(folder, checks.arguments)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


def commit(folder=ROOT):
    """The commit that is checked out, and whether files differ from it."""
    head = git("rev-parse", "--short", "HEAD", folder=folder)
    return f"{head} with changes" if git("status", "--porcelain", "--", ".", UNREAD, folder=folder) else head


def git(*arguments, folder):
    """What git says of a folder."""
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def merged(record, name, entry):
    """The record with a new entry, in the order of the combinations. An older run outlives a mere resolution."""
    old = record.get(name, {})
    if "checks" in old and "checks" not in entry and not entry["reason"]:
        entry = old
    entries = {**record, name: entry}
    return {each: entries[each] for each in COMBINATIONS if each in entries}


def main(arguments):
    """Try combinations and record what came of them; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description="Try releases of PyTorch and numpy.")
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*COMBINATIONS, []], help="by default all of them")
    parser.add_argument("--checks", choices=CHECKS, default="quick", help="what is run")
    parser.add_argument("--resolve-only", action="store_true", help="ask pip what it would install, and run nothing")
    parser.add_argument("--keep", action="store_true", help="keep the environments, which the next call then uses")
    parser.add_argument("--folder", type=Path, default=ROOT / ".venv-versions", help="where the environments are made")
    parser.add_argument("--python", action="append", default=[], help="an interpreter to use besides those found")
    options = parser.parse_args(arguments)
    options.folder = options.folder.resolve()
    failed = 0
    for name in options.names or COMBINATIONS:
        entry = tried(COMBINATIONS[name], options)
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        RECORD.write_text(json.dumps(merged(record, name, entry), indent=1) + "\n")
        failed += entry.get("failed", 0)
        print(f"{name}: {entry['reason'] or outcome(entry)}", flush=True)
    return int(failed > 0)


def outcome(entry):
    """In a few words, of an entry that resolves."""
    if "checks" not in entry:
        return f"resolves, with {', '.join(f'{name} {version}' for name, version in entry['versions'].items())}"
    return f"{entry['passed']} passed, {entry['failed']} failed, {entry['skipped']} skipped"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
