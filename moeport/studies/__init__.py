"""Studies of several runs, or of one run's expert capacity."""
