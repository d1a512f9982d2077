"""What tests of CUDA's kernels share."""

import pytest


@pytest.fixture
def bits_may_change():
    """Other tests may have made PyTorch deterministic."""
    import torch  # a conftest that needs it would end the collection where there is no PyTorch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)
