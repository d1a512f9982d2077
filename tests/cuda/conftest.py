"""What tests of CUDA's kernels share."""

import pytest
import torch


@pytest.fixture
def bits_may_change():
    """Other tests may have made PyTorch deterministic."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)
