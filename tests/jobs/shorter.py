"""Imported by the test processes and the forker of ranks: runs of a few steps do not spend their time on a sample."""

from moeport.training import task

task.SAMPLE_TOKENS = 4
