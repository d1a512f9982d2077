"""What was run where: one table for README.md, the home page and docs/backends.md.

`tests/docs/test_platforms.py` holds it to the backends that there are, to the releases that the tests install, and to
the history of the repository.
"""

from collections.abc import Mapping
from dataclasses import dataclass

NOT_RUN = "not run on hardware"


@dataclass(frozen=True)
class Platform:
    """A framework on a device."""

    title: str
    state: str
    tests: str = ""
    """What the test suite runs there; empty: nothing."""
    hardware: str = NOT_RUN
    """What was run on real accelerators: commit, card and date; empty: it needs none."""


PLATFORMS: Mapping[tuple[str, str], Platform] = {
    ("torch", "cpu"): Platform(
        "PyTorch on CPUs", "trains", "everything, with PyTorch 2.13.0, on one and on several ranks (gloo)", ""
    ),
    ("mindspore", "cpu"): Platform(
        "MindSpore on CPUs", "trains", "everything that MindSpore 2.10.0 can do, on one and on several ranks", ""
    ),
    ("numpy", "cpu"): Platform(
        "numpy on CPUs", "forward only: the reference of the tests", "everything that needs no gradients", ""
    ),
    ("torch", "cuda"): Platform(
        "PyTorch on NVIDIA GPUs",
        "trains",
        "the Triton kernels, in Triton's interpreter",
        "commit 5b30eb3 on one H100 on 2026-11-28: 2,031 of 2,032 tests passed; later code, the fused kernels, and "
        f"several GPUs: {NOT_RUN}",
    ),
    ("torch", "npu"): Platform(
        "PyTorch on Ascend NPUs", "written", "the real front end of torch_npu 2.13.0 over emulated kernels"
    ),
    ("mindspore", "npu"): Platform("MindSpore on Ascend NPUs", "written"),
}
"""By backend and device."""


def table() -> str:
    """A row per platform."""
    lines = ["| Where | State | In the test suite | On accelerators |", "|---|---|---|---|"]
    for each in PLATFORMS.values():
        hardware = each.hardware.replace(NOT_RUN, f"**{NOT_RUN}**") or "-"
        lines.append(f"| {each.title} | {each.state} | {each.tests or '-'} | {hardware} |")
    return "\n".join(lines)
