"""`hccl` over gloo: each collective runs on CPU tensors over the device's memory, and has ended when it returns."""

import torch
import torch.distributed as dist

from tests.npu.emulation.memory import BACKEND, calls, on_host

REDUCTIONS = (dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.AVG)
"""What HCCL reduces with."""


def register(functional):
    """Make `hccl` mean this in this process, also to the functional collectives that DTensor calls."""
    dist.Backend.register_backend("hccl", lambda options, more=None: Hccl(options), extended_api=True, devices=["npu"])
    for function in (all_gather_into_tensor, all_reduce, all_to_all_single, broadcast, reduce_scatter_tensor):
        functional.impl(function.__name__, function, BACKEND, allow_override=True)


class Hccl(dist.ProcessGroup):
    """The process group of that name."""

    def __init__(self, options):
        super().__init__(options.group_rank, options.group_size)
        self.own, self.others = options.group_rank, options.group_size
        self.gloo = dist.ProcessGroupGloo(options.store, options.group_rank, options.group_size, options.timeout)
        self.given_name = ""

    # A process group without a backend in C++ keeps neither its name, for which DeviceMesh asks, nor its devices.

    def _set_group_name(self, name):
        self.given_name = name

    @property
    def group_name(self):
        return self.given_name

    @property
    def _device_types(self):
        return [torch.device("npu")]

    def _get_backend(self, device):
        return self

    def getBackendName(self):
        return "hccl"

    def rank(self):
        return self.own

    def size(self):
        return self.others

    def allreduce(self, tensors, opts=None):
        self._reduce(_hosts(tensors), _reduction(opts))
        return _ended("allreduce", tensors)

    def allreduce_coalesced(self, tensors, opts=None):
        return self.allreduce(tensors, opts)

    def reduce(self, tensors, opts):
        parts = [x.clone() for x in _hosts(tensors)]
        self._reduce(parts, _reduction(opts))
        if opts.rootRank == self.own:
            for own, part in zip(_hosts(tensors), parts, strict=True):
                own.copy_(part)
        return _ended("reduce", tensors)

    def broadcast(self, tensors, opts):
        self.gloo.broadcast(_hosts(tensors), opts).wait()
        return _ended("broadcast", tensors)

    def allgather(self, outputs, tensors, opts=None):
        self.gloo.allgather([_hosts(parts) for parts in outputs], _hosts(tensors)).wait()
        return _ended("allgather", outputs)

    def _allgather_base(self, output, tensor, opts=None):
        parts = _host(output).view(self.others, *tensor.shape).unbind()
        self.gloo.allgather([list(parts)], [_host(tensor).contiguous()]).wait()
        return _ended("allgather_base", output)

    def allgather_into_tensor_coalesced(self, outputs, tensors, opts=None):
        for output, tensor in zip(outputs, tensors, strict=True):
            self._allgather_base(output, tensor)
        return _ended("allgather_into_tensor_coalesced", outputs)

    def gather(self, outputs, tensors, opts):
        self.gloo.gather([_hosts(parts) for parts in outputs], _hosts(tensors), opts).wait()
        return _ended("gather", outputs)

    def scatter(self, outputs, tensors, opts):
        self.gloo.scatter(_hosts(outputs), [_hosts(parts) for parts in tensors], opts).wait()
        return _ended("scatter", outputs)

    def _reduce_scatter_base(self, output, tensor, opts=None):
        whole = _host(tensor).clone()
        self._reduce([whole], _reduction(opts))
        _host(output).copy_(whole.view(self.others, *output.shape)[self.own])
        return _ended("reduce_scatter_base", output)

    def reduce_scatter(self, outputs, tensors, opts=None):
        for output, parts in zip(outputs, tensors, strict=True):
            wholes = [x.clone() for x in _hosts(parts)]
            self._reduce(wholes, _reduction(opts))
            _host(output).copy_(wholes[self.own])
        return _ended("reduce_scatter", outputs)

    def reduce_scatter_tensor_coalesced(self, outputs, tensors, opts=None):
        for output, tensor in zip(outputs, tensors, strict=True):
            self._reduce_scatter_base(output, tensor, opts)
        return _ended("reduce_scatter_tensor_coalesced", outputs)

    def alltoall_base(self, output, tensor, received, sent, opts=None):
        for name, x, sizes in (("output", output, received), ("input", tensor, sent)):
            if not x.is_contiguous():
                raise RuntimeError(f"all_to_all_single: the {name} is not contiguous")
            if not (sum(sizes) == x.shape[0] if sizes else x.shape[0] % self.others == 0):
                raise RuntimeError(f"all_to_all_single: {list(sizes)} are no parts of {x.shape[0]} rows of {name}")
        self.gloo.alltoall_base(_host(output), _host(tensor), list(received), list(sent)).wait()
        return _ended("alltoall_base", output)

    def alltoall(self, outputs, tensors, opts=None):
        """Each rank receives its part of every rank's list, by sends of one to one."""
        waiting = []
        for rank, (output, tensor) in enumerate(zip(_hosts(outputs), _hosts(tensors), strict=True)):
            if rank == self.own:
                output.copy_(tensor)
            else:
                waiting += [self.gloo.send([tensor], rank, 0), self.gloo.recv([output], rank, 0)]
        for work in waiting:
            work.wait()
        return _ended("alltoall", outputs)

    def barrier(self, opts=None):
        self.gloo.barrier().wait()
        return _ended("barrier", None)

    def send(self, tensors, to, tag=0):
        self.gloo.send(_hosts(tensors), to, tag).wait()
        return _ended("send", tensors)

    def recv(self, tensors, source, tag=0):
        self.gloo.recv(_hosts(tensors), source, tag).wait()
        return _ended("recv", tensors)

    def batch_isend_irecv(self, kinds, tensors, peers):
        """HCCL's own, which torch_npu puts in place of PyTorch's: no message waits for another."""
        calls_of = {"isend": self.gloo.send, "irecv": self.gloo.recv}
        messages = zip(kinds, _hosts(tensors), peers, strict=True)
        for work in [calls_of[kind]([x], peer, 0) for kind, x, peer in messages]:
            work.wait()
        return _ended("batch_isend_irecv", tensors)

    all_gather_single = _allgather_base
    reduce_scatter_single = _reduce_scatter_base
    all_to_all_single = alltoall_base

    def _reduce(self, tensors, reduction):
        """In place; the mean is the sum, divided, as HCCL computes it."""
        options = dist.AllreduceOptions()
        mean = reduction == dist.ReduceOp.AVG
        options.reduceOp = dist.ReduceOp.SUM if mean else reduction
        for x in tensors:
            self.gloo.allreduce([x], options).wait()
            if mean:
                x.div_(self.others)


def _host(tensor):
    if tensor.device.type != "npu":
        raise RuntimeError(f"hccl communicates tensors of the device alone (got one on {tensor.device})")
    return on_host(tensor)


def _hosts(tensors):
    return [_host(x) for x in tensors]


def _reduction(options):
    wanted = getattr(options, "reduceOp", dist.ReduceOp.SUM)
    if not any(wanted == known for known in REDUCTIONS):
        raise RuntimeError(f"hccl does not reduce with {wanted}")
    return wanted


def _ended(name, result):
    """Work that has ended."""
    calls[f"hccl::{name}"] += 1
    future = torch.futures.Future()
    future.set_result(result)
    return torch._C._distributed_c10d._create_work_from_future(future)


# The functional collectives. Those of PyTorch ask a process group for its backend in C++, which this one does not have.


def all_gather_into_tensor(x, size, group):
    out = x.new_empty(size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), _group(group))
    return out


def reduce_scatter_tensor(x, reduction, size, group):
    out = x.new_empty(x.shape[0] // size, *x.shape[1:])
    dist.reduce_scatter_tensor(out, x.contiguous(), _named(reduction), _group(group))
    return out


def all_reduce(x, reduction, group):
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, _named(reduction), _group(group))
    return out


def all_to_all_single(x, received, sent, group):
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), _group(group))
    return out


def broadcast(x, source, group):
    out = x.clone(memory_format=torch.contiguous_format)
    dist.broadcast(out, group_src=source, group=_group(group))
    return out


def _group(name):
    return torch._C._distributed_c10d._resolve_process_group(name)


def _named(reduction):
    return getattr(dist.ReduceOp, reduction.upper())
