"""`moeport` in a process of a job under torchrun or msrun, whose number is written down: FOLDER ARGUMENTS."""

import os
import sys
from pathlib import Path

from moeport.cli.main import main

folder, sys.argv = Path(sys.argv[1]), ["moeport", *sys.argv[2:]]
if os.environ.get("MS_ROLE") != "MS_SCHED":
    rank = os.environ.get("RANK", os.environ.get("RANK_ID"))
    (folder / f"pid.{rank}").write_text(str(os.getpid()))
main()
