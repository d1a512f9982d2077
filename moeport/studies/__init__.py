"""Studies of runs and tokenizers: several side by side, or one in detail."""
