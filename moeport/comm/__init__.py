"""Communication between the processes of a job, in framework-neutral code."""
