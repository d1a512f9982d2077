"""What neutral code may use of an array, whatever framework it belongs to."""

from typing import Any

Array = Any
"""An array of the backend: numpy.ndarray, torch.Tensor or mindspore.Tensor."""
