"""A profile of training steps: marks, traces and what they say, memory."""
