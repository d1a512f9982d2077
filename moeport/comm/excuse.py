"""A rank that cannot start tells the others, which would wait for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from moeport.comm.rendezvous import excuse
from moeport.errors import UserError
from moeport.launch.launcher import launched


@contextmanager
def excused() -> Iterator[None]:
    """In the block, which ends before the ranks meet, an error of the user is told to the other ranks of a job.

    torchrun and msrun end the other ranks by themselves.
    """
    try:
        yield
    except UserError as error:
        launch = launched()
        if launch and launch.launcher != "msrun" and "TORCHELASTIC_RUN_ID" not in os.environ:
            excuse(launch, " ".join(str(error).split()))
        raise
