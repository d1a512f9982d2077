"""`python -m moeport.launch.node [--npus] LAUNCHER ...`: what a Slurm task does, run the launcher of its node.

`--npus`: the ranks compute on Ascend NPUs, so they also need to know the network interface of their node.
"""

import sys

from moeport.launch.commands import run
from moeport.launch.npu import on_node

if __name__ == "__main__":
    command = sys.argv[1:]
    if command[0] == "--npus":
        sys.exit(run(command[1:], on_node(command)))
    sys.exit(run(command))
