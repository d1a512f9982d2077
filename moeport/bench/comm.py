"""What `moeport bench comm` does: times collectives and expert exchanges on the ranks of a job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from moeport.backends.base import Backend
from moeport.bench.job import current_job, describe_ranks, joined, machine
from moeport.bench.measure import measure
from moeport.bench.operations import COLLECTIVES, Elements, Measured, collective, expert_exchange
from moeport.bench.options import CommOptions, Tokens, check_experts, check_names, chunk_counts, dtypes
from moeport.bench.output import Row, average_busbw, summary, table, write_csv, write_json, write_plot
from moeport.comm.communicator import ITEM_BYTES, Communicator
from moeport.comm.exchange import EXCHANGES, ExpertExchange
from moeport.config import config_from_dict
from moeport.errors import UserError
from moeport.launch.launcher import Launch
from moeport.model.auto_exchange import label
from moeport.pages.console import wide_console
from moeport.plan.traffic import expert_choices


def bench_comm(options: CommOptions) -> bool:
    """Time every operation at every size, print a table and write the files. Every rank must call it.

    Returns: whether all values were correct.

    Raises UserError for invalid options, before anything starts.
    """
    launch = current_job("comm")
    plan = _plan(options, launch)
    keys = {"name": plan.backend, "device": options.target.device, "dtype": plan.dtypes[0]}
    with joined(launch, "bench comm", config_from_dict({"backend": keys}), options) as (backend, communicator):
        operations = _Operations(options, plan, communicator, backend)
        rows = [row for dtype in plan.dtypes for size in plan.sizes for row in operations.rows(dtype, size)]
        if communicator.rank == 0:
            _show(options, plan, communicator, backend, rows)
    return not any(row.wrong for row in rows)


@dataclass(frozen=True)
class _Plan:
    """What is timed, from valid options."""

    backend: str
    names: Sequence[str]
    dtypes: Sequence[str]
    sizes: Sequence[int]
    """Bytes."""
    reductions: Sequence[str]
    roots: Sequence[int]
    chunks: Sequence[int]

    @property
    def exchanges(self) -> list[str]:
        """Those of the names that are exchanges of experts."""
        return [name for name in self.names if name in EXCHANGES]


def _plan(options: CommOptions, launch: Launch) -> _Plan:
    """Raises UserError for invalid options; those that no operation uses are not looked at."""
    known = [*COLLECTIVES, *EXCHANGES]
    check_names("operation", options.operations, known)
    names = list(dict.fromkeys(options.operations)) or known
    options.target.check()
    backend = options.target.backend or launch.backend
    exchanges = any(name in EXCHANGES for name in names)
    if exchanges:
        _check_tokens(options.tokens, launch.size)
    return _Plan(
        backend,
        names,
        dtypes(options.dtype, backend, options.target.device),
        options.sizes.values(),
        options.variants.reductions(names),
        options.variants.roots(names, launch.size),
        chunk_counts(options.chunks) if exchanges else [1],
    )


def _check_tokens(tokens: Tokens, ranks: int) -> None:
    """Raises UserError for tokens that cannot be exchanged among these ranks."""
    check_experts(tokens.experts, ranks)
    if tokens.top_k > tokens.experts:
        raise UserError(
            f"--top-k {tokens.top_k}: more experts per token than there are; expected at most {tokens.experts}"
        )
    expert_choices(tokens.traffic, 1, tokens.experts, tokens.top_k, rank=0, size=ranks, node=0, nodes=1)


class _Operations:
    """The operations of a benchmark, prepared for one size after another."""

    def __init__(self, options: CommOptions, plan: _Plan, communicator: Communicator, backend: Backend):
        self.options, self.plan, self.communicator, self.backend = options, plan, communicator, backend
        self.exchanges: Mapping[str, list[ExpertExchange]] = {
            name: [EXCHANGES[name](communicator, options.tokens.experts, count) for count in plan.chunks]
            for name in plan.exchanges
        }
        self._timed: set[tuple[object, ...]] = set()

    @property
    def communicators(self) -> list[Communicator]:
        """All communicators that carry data, that of all ranks first."""
        carrying = [each for same in self.exchanges.values() for exchange in same for each in exchange.communicators]
        return list(dict.fromkeys([self.communicator, *carrying]))

    def rows(self, dtype: str, size: int) -> list[Row]:
        """One row per operation, with `size` bytes per rank.

        An operation is left out if this size means as many bytes for it as a size before, as small ones may.
        """
        elements = Elements(dtype, ITEM_BYTES[dtype], size)
        ready = [named for name in self.plan.names for named in self._prepare(name, elements) if self._is_new(*named)]
        if not ready:
            return []
        runs, ops = self.options.runs, self.backend.ops
        timings = measure([operation for _, operation in ready], self.communicators, ops, runs)
        return [Row.of(*named, timing) for named, timing in zip(ready, timings, strict=True)]

    def _is_new(self, name: str, operation: Measured) -> bool:
        key = (name, operation.type, operation.redop, operation.root, operation.bytes)
        is_new = key not in self._timed
        self._timed.add(key)
        return is_new

    def _prepare(self, name: str, elements: Elements) -> Iterator[tuple[str, Measured]]:
        """One operation at one size: a collective in all its variants, an exchange once per number of chunks."""
        tokens, backend = self.options.tokens, self.backend
        for exchange in self.exchanges.get(name, ()):
            yield label(name, exchange.chunks), expert_exchange(exchange, backend, elements, tokens)
        if name in self.exchanges:
            return
        for redop in self.plan.reductions if name == "all_reduce" else ["sum"]:
            for root in self.plan.roots if name == "broadcast" else [0]:
                yield name, collective(name, self.communicator, backend.ops, elements, redop, root)


def _show(options: CommOptions, plan: _Plan, communicator: Communicator, backend: Backend, rows: Sequence[Row]) -> None:
    """Print the results, and write the requested files."""
    tokens, files, console = options.tokens, options.files, wide_console()
    exchanges = (
        f"; expert exchanges: {tokens.experts} experts, top-{tokens.top_k}, {tokens.traffic}, tokens of {tokens.width}"
        f"{', forward and backward' if tokens.backward else ''}"
    )
    console.print(f"{describe_ranks(communicator, backend)}{exchanges if plan.exchanges else ''}", markup=False)
    console.print(table(rows))
    for line in summary(rows):
        console.print(line, markup=False)
    if files.json_file:
        names = ("traffic", "experts", "top_k", "width", "backward")
        asked = {name: getattr(tokens, name) for name in names} | {"average_busbw": average_busbw(rows)}
        write_json(files.json_file, machine(communicator, backend) | asked, rows)
    if files.csv_file:
        write_csv(files.csv_file, rows)
    if files.plot_file:
        write_plot(files.plot_file, rows)
