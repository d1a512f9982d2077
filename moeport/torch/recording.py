"""Recording of any module for parity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from moeport.backends.torch.device import describe_device
from moeport.backends.torch.ops import TorchOps
from moeport.backends.torch.sharding import whole
from moeport.errors import UserError
from moeport.parity.bundle import refuse_existing, save_bundle
from moeport.parity.recorder import Recorder
from moeport.parity.recording import FLOATS, SAMPLE_SIZE, SAMPLED, Keep, Kind, Recording, environment
from moeport.parity.thresholds import coarser
from moeport.torch.hooks import device_of, watch
from moeport.torch.training_state import hyperparameters, optimizer_work, untrained

OVERWRITE = "overwrite=True"
"""How a user replaces a bundle."""


class ModuleRecording:
    """What `record` yields: collects one pass of a module.

    Attributes:
        recording: the complete recording, once the block has ended.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        keep: Mapping[str, Keep],
        sample_size: int,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self._model, self._name, self._optimizer = model, name, optimizer
        self._before = {label: p.detach().clone() for label, p in model.named_parameters()} if optimizer else {}
        self._outputs = 0
        self._device = device_of(model)
        self._ops = TorchOps(self._device)
        self._recorder = Recorder(keep, sample_size=sample_size)
        self._types: list[str] = []
        self.recording: Recording | None = None
        for kind, tensors in (("parameter", model.named_parameters()), ("parameter", model.named_buffers())):
            for label, tensor in tensors:
                self._store(f"{kind}:{label}", "parameter", tensor)

    def add(self, name: str, x: Tensor) -> None:
        """Record a tensor that no module returns, such as the loss; a scalar counts as a loss."""
        self._store(f"user:{name}", "loss" if x.dim() == 0 else "activation", x)

    def _observe(self, role: str, name: str, x: Tensor, given: list[Tensor]) -> None:
        """Store one tensor of the pass; a repeated name is a further call of the module."""
        if role == "given":
            self._store_given(name, x)
            return
        kinds: dict[str, Kind] = {"input": "input", "output": "activation", "gradient": "gradient"}
        kind = kinds[role]
        if role == "output" and not self._is_float(x):
            kind = "plan"
        label = f"gradient:{name}" if role == "gradient" else name
        if role == "output":
            self._outputs += 1
            self._types += [self._ops.dtype(x)] if self._is_float(x) else []
            label = self._numbered(label)
        self._store(label, kind, x, given)

    def _store_given(self, name: str, x: Tensor) -> None:
        """Store what is given to a module, if plain code between modules has computed it."""
        if x.dim() and not self._recorder.sources(x):
            kind: Kind = "activation" if self._is_float(x) else "plan"
            label = self._numbered(name)
            self._recorder.store(self._ops, label, kind, x.detach(), "arithmetic", ())
            self._recorder.trace(x, (label,))

    def _numbered(self, label: str) -> str:
        calls = sum(known == label or known.startswith(f"{label}#") for known in self._recorder.tensors)
        return f"{label}#{calls + 1}" if calls else label

    def _is_float(self, x: Tensor) -> bool:
        return self._ops.dtype(x) in FLOATS

    def _store(self, name: str, kind: Kind, x: Tensor, given: list[Tensor] | None = None) -> None:
        recorder = self._recorder
        inputs = tuple(dict.fromkeys(source for tensor in given or () for source in recorder.sources(tensor)))
        op = name.rpartition(":")[2].partition("#")[0] if given is not None and kind in ("activation", "plan") else None
        recorder.store(self._ops, name, kind, whole(x.detach()), op, inputs)
        recorder.trace(x, (name,))

    def _finish(self) -> Recording:
        if not self._outputs:
            raise UserError(
                f"moeport.torch.record: no forward pass of {type(self._model).__name__} happened inside the block, so "
                "there is nothing to record; call the model that is recorded, or a part of it, inside the block"
            )
        for label, kind, tensor in untrained(self._model):
            self._store(label, kind, tensor)
        if self._optimizer:
            for label, kind, tensor in optimizer_work(self._model, self._optimizer, self._before):
                self._store(label, kind, tensor)
        kernels = {"model": type(self._model).__name__}
        versions = {"torch": torch.__version__}
        dtype = self._types[0] if self._types else "float32"
        for other in self._types[1:]:
            dtype = coarser(dtype, other)
        return Recording(
            name=self._name,
            dtype=dtype,
            tensors=self._recorder.finish(),
            config=hyperparameters(self._optimizer) if self._optimizer else {},
            environment=environment("torch", describe_device(self._device), versions, kernels),
            sample_size=self._recorder.sample_size,
        )


@contextmanager
def record(
    model: nn.Module,
    bundle: Path | str | None = None,
    *,
    name: str | None = None,
    keep: Mapping[str, Keep] | None = None,
    sample_size: int = SAMPLE_SIZE,
    optimizer: torch.optim.Optimizer | None = None,
    overwrite: bool = False,
) -> Iterator[ModuleRecording]:
    """Record the next forward pass of any module, and its backward pass, for `moeport parity compare`.

    Records parameters, buffers, inputs, the output of every submodule, the gradients of outputs and of parameters, and
    what is added by name. Later passes inside the block are not recorded. At its end, buffers and untrained parameters
    are recorded once more, as the state that the pass, or what follows it in the block, left. Sharded tensors (DTensor)
    are gathered, so every rank that holds a part must record the same pass.

    Args:
        model: any module.
        bundle: folder to write when the block ends without an error; None: only `recording` is kept.
        name: name of this side in reports; by default that of the folder, or of the class.
        keep: how much of each kind of tensor is kept, such as `{"activation": "statistics"}`; by default
            samples of parameters, activations and gradients, and everything else in full.
        sample_size: number of entries kept of a sampled tensor.
        optimizer: is stepped inside the block; its state, its options and the changes that it made are recorded too.
        overwrite: replace an older bundle in that folder; otherwise it is refused before anything is recorded.

    Raises UserError if no forward pass happened inside the block, or for an older bundle.
    """
    if bundle is not None:
        refuse_existing(Path(bundle), overwrite, OVERWRITE)
    side = name or (Path(bundle).name if bundle else type(model).__name__)
    collected = ModuleRecording(model, side, SAMPLED if keep is None else keep, sample_size, optimizer)
    with watch(model, collected._observe):
        yield collected
    collected.recording = collected._finish()
    if bundle is not None:
        save_bundle(collected.recording, Path(bundle), overwrite=overwrite, option=OVERWRITE)
