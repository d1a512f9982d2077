"""How much memory two steps of a run take, beside the program, and how much they were predicted to.

Run as a script, in a process that has imported PyTorch: FOLDER SECTIONS, the latter as JSON. It writes
FOLDER/found.json: both, in bytes.
"""

import json
import sys
from pathlib import Path

from moeport.backends import get_backend
from moeport.comm.mesh import single_mesh
from moeport.training.host_memory import rank_memory
from moeport.training.prepare import prepare
from tests.training.start_memory import Growth
from tests.training.tiny import tiny_config


def main(folder, sections):
    config = tiny_config(folder, **sections)
    backend = get_backend(config.backend)
    growth = Growth()
    run = prepare(config, None, backend, single_mesh(backend.ops), print)
    for _ in range(2):
        run.trainer.step()
    need = rank_memory(config, run.trainer.shapes.parameter_specs(), config.training.batch_size, 1)
    found = {"taken": growth.bytes, "predicted": need.on_host(True) - need.saved - need.program}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
