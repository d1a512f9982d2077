"""Starting the ranks of a job: launchers, Slurm, emulated clusters."""
