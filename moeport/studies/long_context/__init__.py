"""Language models on long texts: needles in a haystack, and the loss by position."""
