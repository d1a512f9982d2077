"""A process that imports a framework once and forks the ranks of jobs, which then need not import it.

Run as a script with the modules to import. A line of stdin asks for a rank, as JSON: `arguments` of python, its whole
`environment`, its `directory`, the file of its `output` and the `number` of the request. Lines of stdout say what
happened: {"started": pid, "number": of the request}, {"ended": pid, "code": exit code or minus the signal}. When stdin
ends, so do all ranks.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import sys
from pathlib import Path

POLL_SECONDS = 0.02


def main(modules):
    """Serves requests; returns in a forked rank alone, with its request."""
    for module in modules:
        importlib.import_module(module)
    requests, events = os.dup(0), os.dup(1)
    alive, pending = set(), b""
    while True:
        ready, _, _ = select.select([requests], [], [], POLL_SECONDS if alive else None)
        if ready:
            received = os.read(requests, 1 << 20)
            if not received:
                break
            *lines, pending = (pending + received).split(b"\n")
            for request in map(json.loads, lines):
                pid = os.fork()
                if pid == 0:
                    os.close(requests)
                    os.close(events)
                    return request
                alive.add(pid)
                tell(events, started=pid, number=request["number"])
        while alive and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            alive.discard(ended[0])
            tell(events, ended=ended[0], code=os.waitstatus_to_exitcode(ended[1]))
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    sys.exit()


def tell(events, **what):
    os.write(events, json.dumps(what).encode() + b"\n")


def become(request):
    """The rest of this process is `python ARGUMENTS`."""
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(descriptor, target)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    program, *arguments = request["arguments"]
    if program == "-m":
        module, *arguments = arguments
        sys.argv, sys.path[0] = [module, *arguments], ""
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [program, *arguments], str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    become(main(sys.argv[1:]))
