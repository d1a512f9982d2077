"""The names of MindSpore that are not public, all of them; nothing else in moeport uses any.

MindSpore has no public counterpart of what they are used for. Where a release lacks one, the import of this module
raises BackendUnavailableError, which names it, and so `moeport doctor` and every run do at their start.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor

from moeport.backends.private import require

TRIED = "2.10.0"
"""The release that all of this was tried with."""

NAMES = {
    "mindspore._c_expression:disable_multi_thread": "runs graphs in the calling thread",
    "mindspore.common._grad_function:_Function": "gives a function a gradient of its own",
    "mindspore.common.api:_PyNativeExecutor": "says whether gradients are recorded",
    "mindspore.graph.api:_convert_python_data": "makes tensors of what a graph returns",
    "mindspore.graph.jit_config:_DEFAULT_JIT_CONFIG": "runs a compiled graph",
    "mindspore.graph.jit_trace:_get_caller_lines": "looks up source lines, which is left out",
    "mindspore.graph.jit_trace:_trace_jit_context.phase": "names a compiled graph",
    "mindspore.graph.jit_trace:tr.get_instance": "runs a compiled graph",
    "mindspore.ops.auto_generate.gen_ops_prim:dist_comm_irecv_op": "receives a message on MCCL",
    "mindspore.ops.auto_generate.gen_ops_prim:dist_comm_isend_op": "sends a message on MCCL",
}
"""What each is used for, by module and attribute."""

require("MindSpore", ms.__version__, NAMES, f"install it with: pip install mindspore=={TRIED}")

from mindspore import _c_expression  # noqa: E402
from mindspore.common._grad_function import _Function as Function  # noqa: E402
from mindspore.common.api import _PyNativeExecutor  # noqa: E402
from mindspore.graph import api, jit_trace  # noqa: E402
from mindspore.graph.jit_config import _DEFAULT_JIT_CONFIG  # noqa: E402
from mindspore.ops.auto_generate import gen_ops_prim  # noqa: E402

__all__ = ["Function"]


def run_in_calling_thread() -> None:
    """Run graphs in the thread that calls them; MindSpore accepts this once per process."""
    _c_expression.disable_multi_thread()


def records_gradients() -> bool:
    """Whether operations are recorded for gradients."""
    wanted: bool = _PyNativeExecutor().requires_grad()
    return wanted


def traced_phase() -> str:
    """MindSpore's name of the graph that is traced; called inside a traced function."""
    phase: str = jit_trace._trace_jit_context.phase
    return phase


def look_up_no_sources(file: str) -> None:
    """Give every traced operation the first line of `file` as its source."""
    jit_trace._get_caller_lines = lambda: ([file], [1])


def run_graph(phase: str, args: tuple[Any, ...]) -> Any:
    """Run a compiled graph on tensors. Args: phase, see `traced_phase`."""
    return api._convert_python_data(jit_trace.tr.get_instance().run_graph(phase, _DEFAULT_JIT_CONFIG, args))


# The public isend and irecv look up the group of HCCL even if the group of MCCL is passed.


def send(x: Tensor, peer: int, group: str) -> None:
    """Send a flat tensor to a rank of a group, and wait until it has left."""
    gen_ops_prim.dist_comm_isend_op(x, peer, group, 0)[1].wait()


def receive(x: Tensor, peer: int, group: str) -> None:
    """Overwrite a flat tensor by what a rank of a group sends."""
    gen_ops_prim.dist_comm_irecv_op(x, 0, peer, group)[1].wait()
