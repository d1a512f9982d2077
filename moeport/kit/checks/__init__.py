"""The parts: what each computes in its own processes, and how its results are judged."""
