"""A process that encodes texts for `Encoders`: it reads a tokenizer and batches of texts, and writes their ids."""

from __future__ import annotations

import pickle
import signal
import sys
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np

from moeport.errors import DataError


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Encode what is asked for until the other end closes or is gone.

    A reply is the number of ids of each text and all ids, or a message and nothing.
    """
    try:
        tokenizer = pickle.load(requests)
    except (EOFError, pickle.UnpicklingError):
        return
    while True:
        try:
            texts = pickle.load(requests)
        except (EOFError, pickle.UnpicklingError):
            return
        reply: tuple[Any, Any]
        try:
            encoded = tokenizer.encode_batch(texts)
            reply = [len(ids) for ids in encoded], np.concatenate(encoded)
        except DataError as error:
            reply = str(error), None
        pickle.dump(reply, replies, pickle.HIGHEST_PROTOCOL)
        replies.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one decides
    with suppress(BrokenPipeError):
        serve(sys.stdin.buffer, sys.stdout.buffer)
