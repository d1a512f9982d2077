"""While the experts compute on one chunk of the tokens, the rows of the next are under way."""

from typing import Any

import numpy as np
import pytest
import torch

from moeport.backends.torch.ops import TorchOps
from moeport.comm.exchange.rows import as_steps, exchange_rows, run_in_turn

OPS = TorchOps(torch.device("cpu"))
KINDS = ("counts", "rows", "outputs")
"""What a chunk sends, in order."""


class Logging:
    """One rank that logs when an exchange of a chunk starts and when its result is waited for."""

    size = 1

    def __init__(self, chunk, log):
        self.chunk, self.log, self.kinds = chunk, log, iter(KINDS)

    def start_all_to_all(self, x, send_rows, receive_rows):
        kind = next(self.kinds)
        self.log.append(f"start {kind} {self.chunk}")

        def wait():
            self.log.append(f"wait {kind} {self.chunk}")
            return x

        return wait


def logged(chunks):
    log, parts = [], []
    for chunk in range(chunks):

        def experts(x_RD, counts_E, chunk=chunk):
            log.append(f"experts {chunk}")
            return 2 * x_RD

        x_RD = torch.full((3, 2), float(chunk + 1))
        communicator: Any = Logging(chunk, log)
        parts.append(exchange_rows(OPS, communicator, x_RD, np.array([1, 2]), as_steps(experts)))
    outputs: list[Any] = run_in_turn(parts)
    assert [y.unique().tolist() for y in outputs] == [[2.0 * (chunk + 1)] for chunk in range(chunks)]
    return {event: place for place, event in enumerate(log)}


@pytest.mark.parametrize("chunks", [2, 4])
def test_rows_and_outputs_travel_beside_the_experts(chunks):
    at = logged(chunks)
    for chunk in range(chunks - 1):
        after = chunk + 1
        assert at[f"start rows {after}"] < at[f"experts {chunk}"] < at[f"wait rows {after}"]
        assert at[f"start outputs {chunk}"] < at[f"experts {after}"] < at[f"wait outputs {chunk}"]


def test_the_host_reads_all_counts_before_any_expert_computes():
    """Reading them waits for the device, which therefore must not have the experts before it."""
    at = logged(3)
    assert max(at[f"wait counts {chunk}"] for chunk in range(3)) < at["experts 0"]
