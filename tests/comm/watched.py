"""A process with a Liveness and no framework. Run by test_liveness."""

import contextlib
import os
import socket
import sys
import threading
import time
from pathlib import Path

from moeport.comm import liveness
from moeport.comm.liveness import HEARTBEAT_SECONDS, PURPOSE, Call, Listener, Liveness, port_at


def main(rank: int, size: int, folder: Path, mode: str) -> None:
    liveness.ANSWER_SECONDS = 2.0
    listener, address = None, folder / "address"
    if rank == 0:
        listener = Listener(["127.0.0.1"])
        if mode == "strangers":
            threading.Thread(target=strangers, args=(listener,), daemon=True).start()
        (folder / "new").write_text(f"{port_at(listener.described(), '127.0.0.1')} {listener.token}")
        (folder / "new").rename(address)
    while not address.exists():
        time.sleep(0.01)
    port, token = address.read_text().split()
    timeout = 1.5 if mode.startswith("late") else 2.0 if mode == "unconnected" else 60.0
    watch = Liveness(rank, size, listener, ("127.0.0.1", int(port)), token, timeout)
    (folder / f"nodes.{rank}").write_text(str(watch.nodes))
    run = ending if mode == "strangers" else globals()[mode]
    run(watch, rank, tuple(range(size)), folder)


def strangers(listener: Listener) -> None:
    """Connections that are not of the job: silent, trickling, garbage, a wrong token, the right one without a rank."""
    port, token = port_at(listener.described(), "127.0.0.1"), listener.token.encode()
    lines = [
        b"",
        b"GET / HTTP/1.0\r\n\r\n",
        bytes(range(256)) * 1000,
        b"\xff\xff\xff\x7f",
        PURPOSE + b"0" * 32 + b'{"rank": 1, "host": "a", "pid": 1}\n',
        PURPOSE + token + b"{}\n",
        PURPOSE + token + b"[" * 100_000 + b"\n",
        PURPOSE + token + b'{"rank": 7, "host": "a", "pid": 1}\n',
    ]
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
    for text in lines:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(text)
    for connection in held:
        with contextlib.suppress(OSError):
            connection.sendall(b"m")


def blocked(watch, rank, ranks, folder):
    """Every rank works, then waits for ever in a call; the last lines of a process are lost if nobody flushes them."""
    with watch.call(Call(ranks, 1, "all_gather")):
        pass
    print(f"written by {rank}", end="")
    with watch.call(Call(ranks, 2, "all_to_all")):
        (folder / f"ready.{rank}").touch()
        threading.Event().wait()


def ending(watch, rank, ranks, folder):
    time.sleep(0.3 * (len(ranks) - rank if folder.name == "backwards" else rank))
    watch.close()


def unconnected(watch, rank, ranks, folder):
    raise AssertionError("it must not connect")


def late(watch, rank, ranks, folder):
    with watch.call(Call(ranks, 1, "barrier")):
        pass
    if rank == 2:
        time.sleep(60)
    with watch.call(Call(ranks, 2, "all_gather")):
        time.sleep(60)


def late_together(watch, rank, ranks, folder):
    with watch.call(Call(ranks, 1, "all_to_all", f"sends {rank}")):
        time.sleep(60)


def late_but_awaited(watch, rank, ranks, folder):
    if rank == 2:
        time.sleep(2.5)
    watch.agree((), is_patient=True)
    watch.close()


def late_in_a_group(watch, rank, ranks, folder):
    """Ranks 1 and 2 wait for each other in different groups."""
    if rank == 2:
        with watch.call(Call((0, 2), 1, "all_reduce")):
            (folder / "there").touch()
            time.sleep(60)
    if rank == 1:
        while not (folder / "there").exists():
            time.sleep(0.01)
        time.sleep(2 * HEARTBEAT_SECONDS)  # the other is late first
        with watch.call(Call((1, 2), 1, "all_gather")):
            time.sleep(60)
    time.sleep(60)


def error(watch, rank, ranks, folder):
    with watch.call(Call(ranks, 1, "all_reduce", "sum of float32 (3,)")):
        if rank == 1:
            raise RuntimeError("the network\nis down")
        threading.Event().wait()


def echo(watch, rank, ranks, folder):
    """When rank 1 dies, the library raises on the others before anything else is known."""
    with watch.call(Call(ranks, 1, "all_reduce")):
        if rank == 1:
            time.sleep(0.5)
            os.kill(os.getpid(), 9)
        time.sleep(0.4)
        raise RuntimeError("connection closed by peer")


def frozen(watch, rank, ranks, folder):
    """Rank 0 does not answer."""
    (folder / f"ready.{rank}").touch()
    while not (folder / "go").exists():
        time.sleep(0.05)
    watch.fail(RuntimeError("no memory"))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
