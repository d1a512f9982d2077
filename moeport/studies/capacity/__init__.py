"""The expert capacity that a run needs."""
