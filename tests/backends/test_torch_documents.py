"""What the layers of a pass share of the documents, and that it never outlives them."""

import gc
import weakref

import pytest

torch = pytest.importorskip("torch")

from moeport.backends.torch import documents  # noqa: E402

STARTS = torch.tensor([[0, 0, 2], [0, 1, 1]])
HIDDEN = torch.tensor([[[[0, 1, 1], [0, 0, 1], [1, 1, 0]]], [[[0, 1, 1], [1, 0, 1], [1, 0, 0]]]], dtype=torch.bool)


def test_layers_share_a_mask_until_the_documents_change():
    """As those of a recorded graph do, whose arrays are written again for each batch."""
    given = STARTS.clone()
    first = documents.hidden_pairs(given, causal=True)
    assert torch.equal(first, HIDDEN)
    assert documents.hidden_pairs(given, causal=True) is first
    assert torch.equal(documents.hidden_pairs(given, causal=False), HIDDEN & HIDDEN.mT)
    given.zero_()
    assert torch.equal(documents.hidden_pairs(given, causal=True), torch.ones(2, 1, 3, 3, dtype=torch.bool).triu(1))
    assert torch.equal(documents.hidden_pairs(STARTS.clone(), causal=True), HIDDEN)


def test_a_mask_is_freed_with_its_batch():
    given = STARTS.clone()
    mask = weakref.ref(documents.hidden_pairs(given, causal=True))
    assert mask() is not None
    del given
    gc.collect()
    assert mask() is None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_tensors_without_a_version_have_masks_too(mode):
    with mode():
        assert torch.equal(documents.hidden_pairs(STARTS.clone(), causal=True), HIDDEN)
