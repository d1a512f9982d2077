"""`moeport` in a process of a job under torchrun, whose number is written down: FOLDER ARGUMENTS."""

import os
import sys
from pathlib import Path

from moeport.cli.main import main

folder, sys.argv = Path(sys.argv[1]), ["moeport", *sys.argv[2:]]
(folder / f"pid.{os.environ['RANK']}").write_text(str(os.getpid()))
main()
