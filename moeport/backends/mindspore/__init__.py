"""MindSpore on its CPU target or on Ascend: evaluation, gradients and training, compiled or not."""
