"""Fused kernels for devices of type `cuda`. Not run on hardware."""
