"""Checkpoints whose arrays are in memory, for tests that compare or change them."""

from dataclasses import replace

from moeport.training.checkpoint import open_checkpoint


def load_checkpoint(path):
    checkpoint = open_checkpoint(path)
    return replace(checkpoint, model=dict(checkpoint.model), optimizer=dict(checkpoint.optimizer))
