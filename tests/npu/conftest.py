import contextlib

with contextlib.suppress(ImportError):
    import torch  # noqa: F401  (before tests.npu.emulation, which torch_npu imports as soon as torch imports it)
