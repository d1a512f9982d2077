"""What `moeport bench comm` does: times collectives and expert exchanges on the ranks of a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moeport.backends import get_backend
from moeport.backends.base import Backend
from moeport.bench.job import current_job, describe_ranks, machine
from moeport.bench.measure import measure
from moeport.bench.operations import COLLECTIVES, Measured, collective, expert_exchange
from moeport.bench.options import CommOptions, Tokens, check_experts, check_names, chunk_counts
from moeport.bench.output import Row, table, write_csv, write_json, write_plot
from moeport.comm.communicator import ITEM_BYTES, Communicator
from moeport.comm.exchange import EXCHANGES, ExpertExchange
from moeport.config import config_from_dict
from moeport.errors import UserError
from moeport.model.auto_exchange import label
from moeport.pages.console import wide_console


def bench_comm(options: CommOptions) -> bool:
    """Time every operation at every size, print a table and write the files. Every rank must call it.

    Returns: whether all values were correct.

    Raises UserError for invalid options, before anything starts.
    """
    launch = current_job("comm")
    sizes, chunks = options.sizes.values(), chunk_counts(options.chunks)
    names = _checked_names(options.operations, launch.size, options.tokens)
    target = options.target
    keys = {"name": target.backend or launch.backend, "device": target.device, "dtype": options.dtype}
    backend = get_backend(config_from_dict({"backend": keys}).backend)
    with backend.communicator(launch, target.timeout) as communicator:
        operations = _Operations(options, names, chunks, communicator, backend)
        rows = [row for size in sizes for row in operations.rows(size)]
        if communicator.rank == 0:
            _show(options, communicator, backend, rows)
    return not any(row.wrong for row in rows)


def _checked_names(names: Sequence[str], ranks: int, tokens: Tokens) -> list[str]:
    """The names of the operations, all if none is given; UserError for invalid options."""
    known = [*COLLECTIVES, *EXCHANGES]
    check_names("operation", names, known)
    check_experts(tokens.experts, ranks)
    if tokens.top_k > tokens.experts:
        raise UserError(
            f"--top-k {tokens.top_k}: more experts per token than there are; expected at most {tokens.experts}"
        )
    return list(names) or known


class _Operations:
    """The operations of a benchmark, prepared for one size after another."""

    def __init__(
        self,
        options: CommOptions,
        names: Sequence[str],
        chunks: Sequence[int],
        communicator: Communicator,
        backend: Backend,
    ):
        self.options, self.names, self.communicator, self.backend = options, names, communicator, backend
        self.exchanges: Mapping[str, list[ExpertExchange]] = {
            name: [EXCHANGES[name](communicator, options.tokens.experts, count) for count in chunks]
            for name in names
            if name in EXCHANGES
        }

    @property
    def communicators(self) -> list[Communicator]:
        """All communicators that carry data, that of all ranks first."""
        carrying = [each for same in self.exchanges.values() for exchange in same for each in exchange.communicators]
        return list(dict.fromkeys([self.communicator, *carrying]))

    def rows(self, size: int) -> list[Row]:
        """One row per operation, with `size` bytes per rank."""
        ready = [named for name in self.names for named in self._prepare(name, size)]
        runs, ops = self.options.runs, self.backend.ops
        timings = measure([operation for _, operation in ready], self.communicators, ops, runs)
        return [Row.of(*named, timing) for named, timing in zip(ready, timings, strict=True)]

    def _prepare(self, name: str, size: int) -> list[tuple[str, Measured]]:
        """One operation at one size; an exchange once per number of chunks."""
        options, backend = self.options, self.backend
        dtype, item_bytes = options.dtype, ITEM_BYTES[options.dtype]
        if name not in self.exchanges:
            return [(name, collective(name, self.communicator, backend.ops, dtype, item_bytes, size))]
        return [
            (
                label(name, exchange.chunks),
                expert_exchange(exchange, backend, dtype, item_bytes, size, options.tokens),
            )
            for exchange in self.exchanges[name]
        ]


def _show(options: CommOptions, communicator: Communicator, backend: Backend, rows: Sequence[Row]) -> None:
    """Print the results, and write the requested files."""
    tokens, files, console = options.tokens, options.files, wide_console()
    console.print(
        f"{describe_ranks(communicator, backend)}; expert exchanges: {tokens.experts} experts, top-{tokens.top_k}, "
        f"{tokens.traffic}, tokens of {tokens.width}{', forward and backward' if tokens.backward else ''}"
    )
    console.print(table(rows))
    if files.json_file:
        names = ("traffic", "experts", "top_k", "width", "backward")
        asked = {name: getattr(tokens, name) for name in names}
        write_json(files.json_file, machine(communicator, backend) | asked, rows)
    if files.csv_file:
        write_csv(files.csv_file, rows)
    if files.plot_file:
        write_plot(files.plot_file, rows)
