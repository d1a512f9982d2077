"""Fused kernels for CPUs."""
