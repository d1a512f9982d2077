"""Communication between the processes of a job, in code that imports no framework."""
