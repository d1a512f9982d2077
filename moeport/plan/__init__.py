"""Predicting how long an all-to-all and a training step take."""
