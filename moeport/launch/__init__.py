"""How the ranks of a job are started: launchers, Slurm, emulated clusters."""
