"""Rules about what the chosen backend can do."""

from typing import Any

from moeport.config.rule import Rule
from moeport.errors import choices
from moeport.facts import BACKENDS

_LABELS = {"cpu": "the CPU", "cuda": "NVIDIA GPUs", "npu": "Ascend NPUs"}


def _runs_on(device: str, name: str) -> bool:
    return device in ("auto", *BACKENDS[name].devices)


def _wrong_device(device: str, name: str) -> str:
    devices = BACKENDS[name].devices
    if len(devices) == 1:
        return f"backend {name} runs on {_label(devices[0])} only"
    return f"backend {name} does not run on {_label(device)}"


def _expected_device(device: str, name: str) -> str:
    others = [other for other, facts in BACKENDS.items() if device in facts.devices]
    return f"{_either('auto', *BACKENDS[name].devices)}; or backend.name {_either(*others)}"


def _computes_in(dtype: str, name: str, device: str) -> bool:
    return dtype in ("auto", *_dtypes(name, device))


def _wrong_dtype(dtype: str, name: str, device: str) -> str:
    has_it_elsewhere = dtype in BACKENDS[name].dtypes_on("auto")
    return f"backend {name} has no {dtype}" + (f" on {_label(device)}" if has_it_elsewhere else "")


def _expected_dtype(dtype: str, name: str, device: str) -> str:
    return _either("auto", *_dtypes(name, device))


def _dtypes(name: str, device: str) -> tuple[str, ...]:
    """Compute types on the device, or on any device if the backend does not run on it, which another rule reports."""
    return BACKENDS[name].dtypes_on(device if _runs_on(device, name) else "auto")


def _kernel_fault(kernels: str | dict[str, Any], name: str, device: str) -> tuple[str, str]:
    """What is wrong with the first choice that is, and what was expected; empty if nothing is."""
    if isinstance(kernels, str):
        return "", ""
    known = dict.fromkeys(fused.kernel for facts in BACKENDS.values() for fused in facts.fused_on("auto"))
    for kernel, choice in kernels.items():
        if kernel not in known:
            return f"{kernel} is not a kernel that can be chosen", choices(kernel, known).removeprefix("expected ")
        on_device = BACKENDS[name].fused_on(device if _runs_on(device, name) else "auto")
        allowed = ["auto", "default", *(fused.name for fused in on_device if fused.kernel == kernel)]
        if choice not in allowed:
            where = f"backend {name}" if device == "auto" else f"backend {name} on {_label(device)}"
            return f"{where} has no {kernel} named {choice}", choices(choice, allowed).removeprefix("expected ")
    return "", ""


def _names(kernels: str | dict[str, Any], kernel: str) -> bool:
    """Whether an operator is named for a kernel."""
    return not isinstance(kernels, str) and kernels.get(kernel, "auto") not in ("auto", "default")


def _label(device: str) -> str:
    return _LABELS.get(device, device)


def _either(*choices: str) -> str:
    *most, last = choices
    return f"{', '.join(most)} or {last}" if most else last


BACKEND_RULES = (
    Rule(("backend.device", "backend.name"), _runs_on, _wrong_device, _expected_device),
    Rule(("backend.dtype", "backend.name", "backend.device"), _computes_in, _wrong_dtype, _expected_dtype),
    Rule(
        ("backend.kernels", "backend.name", "backend.device"),
        lambda *values: not any(_kernel_fault(*values)),
        lambda *values: _kernel_fault(*values)[0],
        lambda *values: _kernel_fault(*values)[1],
    ),
    Rule(
        ("backend.kernels", "parallelism.expert"),
        lambda kernels, ranks: ranks == 1 or not _names(kernels, "routed_mlp"),
        "names a form of routed_mlp, but with parallelism.expert = {1} tokens visit other ranks between its parts",
        "auto or default for routed_mlp; the experts are grouped_mlp there",
    ),
    Rule(
        ("backend.compile", "backend.name"),
        lambda compiled, name: BACKENDS[name].compiles or not compiled,
        "backend {1} cannot compile",
        "false or null",
    ),
    Rule(
        ("backend.cuda_graphs", "backend.name", "backend.device"),
        lambda wish, name, device: wish is not True or bool({"auto", device} & {"auto", *BACKENDS[name].graphs_on}),
        "backend {1} has no CUDA graphs on {2}",
        "auto or false",
    ),
    Rule(
        ("optimizer.name", "backend.name"),
        lambda rule, name: rule in BACKENDS[name].optimizers or not BACKENDS[name].trains,
        "backend {1} updates pieces of parameters, which have no rows and columns to estimate second moments from",
        lambda _, name: f"{_either(*BACKENDS[name].optimizers)}, or backend.name torch",
    ),
    Rule(
        ("parallelism.shard", "backend.name"),
        lambda shard, name: bool(BACKENDS[name].shards) or not BACKENDS[name].trains or not shard,
        "backend {1} cannot shard",
        "false or null",
    ),
    Rule(
        ("training.activation_checkpointing", "backend.name"),
        lambda recomputed, name: BACKENDS[name].recomputes or not BACKENDS[name].trains or not recomputed,
        "backend {1} cannot recompute activations",
        "false",
    ),
)
"""A backend that only evaluates accepts training options: it ignores them."""
