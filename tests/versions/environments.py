"""Makes an environment of a combination, if pip finds one, and runs tests in it."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from tests.versions.combinations import PYTHONS, ROOT

WHEELS_ONLY = ("--only-binary=:all:",)
REPORTED = ("torch", "numpy", "scipy", "safetensors", "tokenizers", "pydantic", "triton")
"""Packages whose versions the record has."""


def interpreter(series, given=()):
    """An interpreter of a series such as 3.12: one of those given, on the path, or of pyenv; None if there is none.

    One without pip, as some distributions have it, cannot make environments and is passed over.
    """
    name = f"python{series}"
    of_pyenv = sorted((Path.home() / ".pyenv" / "versions").glob(f"{series}.*/bin/{name}"))
    for candidate in (*given, shutil.which(name), *of_pyenv):
        if candidate and version_of(candidate).startswith(f"{series}."):
            return str(candidate)
    return None


@functools.cache
def newest():
    """The newest interpreter that there is; at least the one that runs this."""
    return next((found for series in reversed(PYTHONS) if (found := interpreter(series))), sys.executable)


def version_of(python):
    """The version of an interpreter; empty if it does not start, as pyenv's stand-ins may not, or has no pip."""
    program = "import pip, platform; print(platform.python_version())"
    try:
        return subprocess.run([python, "-c", program], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def resolve(combination, python):
    """What pip would install: versions by package, and why it would not; one of the two is empty.

    Only wheels count: the question is what users get without a compiler. Where `python` is None, the pip of the newest
    interpreter answers for that series, with the markers of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        elsewhere = () if python else ("--python-version", combination.python, "--target", folder)
        command = [python or newest(), "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--report", str(report), *WHEELS_ONLY, *elsewhere, *combination.requirements]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {}, reason_of(done.stderr)
        found = (item["metadata"] for item in json.loads(report.read_text())["install"])
        versions = {each["name"].lower(): each["version"] for each in found}
        return {name: versions[name] for name in REPORTED if name in versions}, ""


def reason_of(errors):
    """Pip's reason in one line, without its lists of versions."""
    lines = [line.removeprefix("ERROR: ").strip() for line in errors.splitlines()]
    conflict = [line for line in lines if " depends on " in line or line.startswith("The user requested")]
    if conflict:
        return "conflict: " + "; ".join(dict.fromkeys(conflict))
    nothing = [line for line in lines if line.startswith("No matching distribution found")]
    said = nothing or [line for line in lines if line and not line.startswith("WARNING")] or ["no reason given"]
    return re.sub(r" \(from .*", "", said[-1])


def make(combination, python, folder, packages):
    """Make the environment in a folder, or take the one that is there; why pip cannot, or empty."""
    done = folder / ".made"
    if done.exists():
        return ""
    subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
    command = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *WHEELS_ONLY]
    installed = subprocess.run([*command, *combination.requirements, *packages], capture_output=True, text=True)
    if installed.returncode:
        return reason_of(installed.stderr)
    done.touch()
    return ""


def installed_in(folder):
    """Versions of packages in an environment."""
    done = subprocess.run([folder / "bin" / "python", "-m", "pip", "list", "--format=json"], capture_output=True)
    versions = {each["name"].lower(): each["version"] for each in json.loads(done.stdout)}
    return {name: versions[name] for name in REPORTED if name in versions}


def run(folder, arguments):
    """Run pytest in an environment on this checkout.

    Returns: numbers of tests that `passed`, `failed` and were `skipped`, and up to ten `failures`. A run that ends
    before its tests do has one failure, which says how.
    """
    with tempfile.TemporaryDirectory() as temporary:
        results = Path(temporary) / "results.xml"
        command = [folder / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        if not results.exists():
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            return counted(ElementTree.Element("none"), f"pytest ended with {done.returncode}: {' '.join(last)}")
        return counted(ElementTree.parse(results).getroot())


def counted(results, ending=""):
    """Sums of a file of results in JUnit's form."""
    cases = list(results.iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    return {
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed) + bool(ending),
        "skipped": skipped,
        "failures": [*names[:10], *([ending] if ending else [])],
    }
