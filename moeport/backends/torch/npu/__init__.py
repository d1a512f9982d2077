"""Fused operators of torch-npu, for devices of type `npu`. Not run on hardware."""
