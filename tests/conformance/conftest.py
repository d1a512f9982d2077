import pytest


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory():
    """What a kernel forgets to write shows."""
    torch = pytest.importorskip("torch")
    from tests.conformance.targets import TARGETS

    for target in TARGETS:
        if target.backend == "torch" and target.device == "cpu":
            target.build()  # builds once and sets the flag, so it is built before
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
