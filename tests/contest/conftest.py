"""The benchmarks are scripts beside their package, which is found through the path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
