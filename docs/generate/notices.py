"""Write THIRD_PARTY.md, the licences of the packages that moeport asks for: `make notices`.

Call it with the Pythons of the environments in which they are installed. What is installed in none keeps its row.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "THIRD_PARTY.md"
ROW = re.compile(r"^\| ([\w.-]+) \| .+? \| (.+) \| (.+) \|$", re.MULTILINE)
HEADING = """\
# Packages that moeport uses

The sdist and the wheel of moeport hold its own code alone; pip installs these packages beside it, each under its own
licence. Listed is what `pyproject.toml` asks for, with the extras that ask for it; `make sbom` lists with versions all
that an installation consists of. Images made from `containers/` hold the packages themselves, with their licence texts.

Made by `make notices`, with pip-licenses, from what the packages say of themselves.

| Package | Asked for by | Licence | Home |
|---|---|---|---|
"""


def asked_for() -> dict[str, list[str]]:
    """The packages that pyproject.toml asks for, in lower case, with what asks for each: moeport or an extra of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found: dict[str, list[str]] = {}
    for asker, requirements in {"moeport": project["dependencies"], **project["optional-dependencies"]}.items():
        for requirement in requirements:
            name = normal(re.split(r"[^\w.-]", requirement)[0])
            if name != "moeport" and asker not in found.setdefault(name, []):
                found[name].append(asker)
    return dict(sorted(found.items()))


def normal(name: str) -> str:
    """The normalised name of a package: the form in which indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(python: str) -> dict[str, tuple[str, str]]:
    """The licence and home of each package in the environment of a Python."""
    command = [sys.executable, "-m", "piplicenses", "--python", python, "--format", "json", "--from", "mixed"]
    done = subprocess.run([*command, "--with-urls", "--with-system"], stdout=subprocess.PIPE, check=True)
    return {normal(each["Name"]): (" ".join(each["License"].split()), each["URL"]) for each in json.loads(done.stdout)}


def written() -> dict[str, tuple[str, str]]:
    """The same of each row that the file has."""
    text = FILE.read_text(encoding="utf-8") if FILE.is_file() else ""
    return {name: (licence, home) for name, licence, home in ROW.findall(text)}


def main(pythons: list[str]) -> None:
    """Write the file."""
    known = written()
    for python in pythons:
        known |= installed(python)
    wanted = asked_for()
    if missing := wanted.keys() - known.keys():
        sys.exit(f"installed in none of {', '.join(pythons)}, and new in {FILE.name}: {', '.join(sorted(missing))}")
    rows = (f"| {name} | {', '.join(askers)} | {' | '.join(known[name])} |" for name, askers in wanted.items())
    FILE.write_text(HEADING + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
