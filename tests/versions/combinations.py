"""Releases of Python, PyTorch and numpy that are tried together, and what is run on them."""

import tomllib
from dataclasses import dataclass
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
TORCH = ("2.11", "2.12", "2.13", "2.14", "2.15")
NUMPY = ("1.26", "2")


@dataclass(frozen=True)
class Combination:
    """One environment; of each package the newest release of that series."""

    python: str
    torch: str | None
    """None: PyTorch is not installed."""
    numpy: str

    @property
    def name(self):
        return f"py{self.python}-{f'torch{self.torch}' if self.torch else 'no-torch'}-numpy{self.numpy}"

    @property
    def requirements(self):
        """What pip is asked for: the project's own requirements, and these releases."""
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        torch = [f"torch=={self.torch}.*", *project["optional-dependencies"]["torch"]] if self.torch else []
        return [f"numpy=={self.numpy}.*", *torch, *project["dependencies"]]


COMBINATIONS = {
    each.name: each
    for each in (Combination(*values) for values in product(PYTHONS, (None, *TORCH), NUMPY))
    if each.torch is None or each.numpy == "2" or each.torch in (TORCH[0], TORCH[2], TORCH[-1])
}
"""By name. PyTorch asks for no release of numpy, so the older one is tried with the first, a middle and the last."""


BESIDE = {"1.26": ("pyarrow<26",)}
"""Releases that go with a series of numpy and do not say so; the extra `mindspore` has them too."""


@dataclass(frozen=True)
class Checks:
    """Tests that are run in an environment."""

    arguments: tuple[str, ...]
    """Of pytest."""
    packages: tuple[str, ...] = ("pytest>=8.3", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "jsonschema>=4.20")
    extras: tuple[str, ...] = ()
    """Optional dependencies of the project, without the Triton that goes with one release of PyTorch alone."""

    def requirements(self, numpy):
        """What pip is asked for beside a series of numpy."""
        found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        listed = [requirement for extra in self.extras for requirement in found[extra]]
        return [
            *self.packages,
            *BESIDE.get(numpy, ()),
            *(each for each in listed if not each.startswith(("moeport", "triton"))),
        ]


QUICK = """
    tests/backends/test_private_names.py tests/backends/test_cpu_kernels.py tests/backends/test_torch_kernels.py
    tests/backends/test_torch_sorting.py tests/backends/test_compute_copies.py tests/config/test_config_rules.py
    tests/core/test_dispatch.py tests/core/test_parameters.py tests/core/test_weights.py
    tests/conformance/test_forward.py tests/torch_moe/test_updates.py tests/torch_moe/test_state.py
"""
CHECKS = {
    "quick": Checks(("-m", "not slow and not mindspore and not npu and not ranks", *QUICK.split())),
    "check": Checks(
        ("-m", "not slow and not mindspore and not npu and not ranks"),
        extras=("dev", "data", "plot", "tensorboard", "tokenizers", "vision"),
    ),
}
"""`quick` is chosen for what has changed between releases: private names, kernels, arrays, torch.func, state; `check`
is what `make check` tests.
"""
