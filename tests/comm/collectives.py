"""Run the cases in the processes of a job; each rank writes the names of those it has passed.

Arguments: BACKEND FOLDER [sweep]
"""

import os
import sys
from pathlib import Path

from moeport.backends import get_backend
from moeport.config.training import BackendConfig
from moeport.launch.launcher import launched
from tests.comm import cases


def main(name: str, folder: Path, sweep: bool) -> None:
    launch = launched()
    if launch.rank >= 0:
        (folder / f"pid.{launch.rank}").write_text(str(os.getpid()))
    backend = get_backend(BackendConfig(name=name, device="cpu", dtype="float32"))
    with backend.communicator(launch, 60.0) as communicator, (folder / f"done.{launch.rank}").open("w") as done:
        for case in cases.names(name, sweep):
            cases.run(case, communicator, backend)
            print(case, file=done, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:] == ["sweep"])
