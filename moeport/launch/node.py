"""`python -m moeport.launch.node LAUNCHER ...`: what a Slurm task does, run the launcher of its node."""

import sys

from moeport.launch.commands import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
