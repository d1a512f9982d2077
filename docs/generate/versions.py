"""The releases that were tried together, from the record that `make versions` writes."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parents[1] / "versions.json"

Entry = Mapping[str, Any]


def entries() -> list[Entry]:
    """All entries of the record, in its order."""
    return list(json.loads(RECORD.read_text(encoding="utf-8")).values())


def tried() -> str:
    """A table of the combinations in which tests were run, and the series of Python that could not be tried."""
    columns = ("Python", "PyTorch", "numpy", "Tests", "Passed", "Failed", "Skipped", "When", "Commit")
    head = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"
    rows = (
        f"| {each['interpreter']} | {each['versions'].get('torch', 'none')} | {each['versions']['numpy']} "
        f"| `{each['checks']}` | {each['passed']:,} | {_failed(each)} | {each['skipped']:,} "
        f"| {each['date']} | {each['commit']} |"
        for each in entries()
        if "checks" in each
    )
    absent = _absent()
    words = f"Python {', '.join(absent)} was not run: there was no interpreter." if absent else ""
    return "\n".join([head, *rows, "", words]).rstrip()


def resolved() -> str:
    """A table of what pip finds for every combination of series."""
    head = "| PyTorch | numpy | Python | pip finds |\n|---|---|---|---|"
    absent = _absent()
    words = (
        f"There was no interpreter for Python {', '.join(absent)}, so the pip of another one answered for it, and "
        "packages that depend on the version of Python may be missing from its answer."
        if absent
        else ""
    )
    return "\n".join([head, *_grouped(entries()), "", words]).rstrip()


def _absent() -> list[str]:
    """The series of Python that there was no interpreter for."""
    return sorted({each["python"] for each in entries() if each["interpreter"] is None})


def _grouped(all_of: list[Entry]) -> Iterator[str]:
    """Rows, each for all series of PyTorch and of Python for which pip finds the same."""
    pythons: dict[tuple[str, str, str], list[str]] = {}
    for each in sorted(all_of, key=lambda each: (_series(each["torch"]), each["numpy"])):
        torch = f"{each['torch']}.*" if each["torch"] else "none"
        pythons.setdefault((torch, f"{each['numpy']}.*", _found(each)), []).append(each["python"])
    torches: dict[tuple[str, str, str], list[str]] = {}
    for (torch, numpy, found), series in pythons.items():
        torches.setdefault((numpy, ", ".join(series), found), []).append(torch)
    for (numpy, series_of_python, found), series in torches.items():
        yield f"| {', '.join(series)} | {numpy} | {series_of_python} | {found} |"


def _series(torch: str | None) -> list[int]:
    return [int(part) for part in torch.split(".")] if torch else []


def _found(entry: Entry) -> str:
    """What pip finds, or why it finds nothing."""
    if entry["reason"]:
        return f"nothing: {entry['reason']}"
    names = [name for name in ("torch", "numpy", "scipy") if name in entry["versions"]]
    return ", ".join(f"{name} {entry['versions'][name]}" for name in names)


def _failed(entry: Entry) -> str:
    """How many tests failed, and which."""
    names = "; ".join(f"`{name}`" for name in entry["failures"])
    return f"**{entry['failed']:,}**: {names}" if entry["failed"] else "0"
