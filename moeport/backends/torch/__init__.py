"""PyTorch on any device that `torch.accelerator` knows, or the CPU."""
