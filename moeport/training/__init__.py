"""Training: loop, schedules, checkpoints, metrics, report, generation."""
