"""Training several configs and comparing their results."""
