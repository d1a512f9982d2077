"""Checkpoints of other programs in and out, and mixture-of-experts models made from others."""
