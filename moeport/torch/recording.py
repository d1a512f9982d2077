"""Recording of any module for parity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from moeport.backends.torch.device import describe_device
from moeport.backends.torch.ops import TorchOps
from moeport.errors import UserError
from moeport.parity.bundle import refuse_existing, save_bundle
from moeport.parity.finite import non_finite_in
from moeport.parity.recorder import Recorder
from moeport.parity.recording import FLOATS, SAMPLE_SIZE, SAMPLED, Keep, Kind, Recording, TensorRecord, environment
from moeport.parity.thresholds import LIMITS, coarser
from moeport.torch.hooks import device_of, watch
from moeport.torch.plain_tensors import UnreadableTensorError, plain
from moeport.torch.training_state import hyperparameters, optimizer_work, untrained

OVERWRITE = "overwrite=True"
"""How a user replaces a bundle."""
SHOWN = 3
"""Maximum number of names in a note."""
PASSES = {"parameter": "", "input": "", **dict.fromkeys(("moment", "update", "state"), "optimiser step")}
"""Where a kind of tensor was computed; other kinds in the forward pass."""


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
        self._unread: dict[str, list[str]] = {}
        """Names of tensors that were not recorded as they are, by what was done instead."""
        self.non_finite: str | None = None
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
        label = f"gradient:{name}" if role == "gradient" else name
        if role == "output":
            self._outputs += 1
            label = self._numbered(label)
        self._store(label, kinds[role], x, given)

    def _store_given(self, name: str, x: Tensor) -> None:
        """Store what is given to a module, if plain code between modules has computed it."""
        if (_has_no_shape(x) or x.dim()) and not self._recorder.sources(x):
            self._store(self._numbered(name), "activation", x, op="arithmetic")

    def _numbered(self, label: str) -> str:
        calls = sum(known == label or known.startswith(f"{label}#") for known in self._recorder.tensors)
        return f"{label}#{calls + 1}" if calls else label

    def _store(
        self, name: str, kind: Kind, x: Tensor, given: list[Tensor] | None = None, op: str | None = None
    ) -> None:
        recorder = self._recorder
        try:
            kept = plain(x)
        except UnreadableTensorError as error:
            self._unread.setdefault(f"not recorded: {error}", []).append(name)
            return
        if kept.how:
            self._unread.setdefault(kept.how, []).append(name)
        dtype = kept.dtype or self._ops.dtype(kept.tensor)
        is_output = given is not None and kind == "activation"
        if is_output and dtype in LIMITS:
            self._types.append(dtype)
        if is_output:
            op = name.rpartition(":")[2].partition("#")[0]
        if kind == "activation" and dtype not in FLOATS:
            kind = "plan"
        inputs = tuple(dict.fromkeys(source for tensor in given or () for source in recorder.sources(tensor)))
        recorder.store(self._ops, name, kind, kept.tensor, op, inputs, kept.dtype)
        if not _has_no_shape(x):
            recorder.trace(x, (name,))
        self._look(name, kind, op, dtype, kept.tensor)

    def _look(self, name: str, kind: Kind, op: str | None, dtype: str, x: Tensor) -> None:
        """Note the first tensor in which something is not finite, of whose entries only a sample may be kept."""
        if self.non_finite is None and x.is_floating_point() and not bool(x.isfinite().all()):
            values = x.float().cpu().numpy()
            # Any module may return a mask, so no operation is named before it has been looked at.
            found = non_finite_in(TensorRecord(name, kind, dtype, values.shape, values=values))
            place = "backward pass" if kind == "gradient" else PASSES.get(kind, "forward pass")
            self.non_finite = str(replace(found, place=place, op=op)) if found else None

    def _notes(self) -> list[str]:
        """What was not recorded as it is."""
        return [f"{_some(names)}: {how}" for how, names in self._unread.items()]

    def _close(self, bundle: Path | str | None, overwrite: bool, notes: Sequence[str] = ()) -> None:
        """Complete the recording, and write it."""
        recording = self._finish()
        recording.notes += notes
        self.recording = recording
        if bundle is not None:
            save_bundle(recording, Path(bundle), overwrite=overwrite, option=OVERWRITE)

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
            notes=self._notes(),
            non_finite=self.non_finite,
        )


def _has_no_shape(x: Tensor) -> bool:
    return x.is_nested and x.layout == torch.strided


def _some(names: list[str]) -> str:
    """The first names of a list."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


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
    are recorded once more, as the state that the pass, or what follows it in the block, left. What is no dense tensor
    of real numbers is converted, or left out, and the report says so; see `moeport.torch.plain_tensors`. Sharded
    tensors (DTensor) are gathered, so every rank that holds a part must record the same pass.

    Args:
        model: any module.
        bundle: folder to write when the block ends without an error, or after a NaN or infinity even with one; None:
            only `recording` is kept.
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
    try:
        with watch(model, collected._observe):
            yield collected
    except Exception as error:
        if collected.non_finite and collected._outputs:  # a check for NaN may have raised it: what led to it is wanted
            note = f"the block ended with {type(error).__name__}; what was recorded until then is kept"
            collected._close(bundle, overwrite, [note])
        raise
    collected._close(bundle, overwrite)
