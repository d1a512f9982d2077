"""Which operators of torch_npu are called from Python, and how."""

import contextlib

import torch


@contextlib.contextmanager
def recorded(monkeypatch):
    """A list that gets (name, args, kwargs) of each call, as it was written, in every thread."""
    made = []
    with monkeypatch.context() as patch:
        for kind in (torch._ops.OpOverload, torch._ops.OpOverloadPacket):
            patch.setattr(kind, "__call__", _recording(kind.__call__, made))
        yield made


def _recording(call, made):
    def run(self, /, *args, **kwargs):
        known = self._schema.name if isinstance(self, torch._ops.OpOverload) else self._qualified_op_name
        namespace, _, name = known.partition("::")
        if namespace == "npu":
            made.append((name, args, kwargs))
        return call(self, *args, **kwargs)

    return run
