"""MindSpore on the CPU target, without compiled steps: evaluation and gradients."""
