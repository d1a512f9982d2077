"""Kernels in Triton. They are imported where Triton is installed, and only when they are asked for."""
