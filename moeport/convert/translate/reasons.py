"""Why keys of more than one framework have no effect or cannot be expressed."""

from __future__ import annotations

DIVIDED = "how the same model is divided among devices; see parallelism"
HOW = "how it is computed, not what"
NEAREST_RESET = (
    "the nearest is data.document_mask: true, with which an end of text belongs to the document that follows it"
)
"""Why resets at documents, after the end of text, cannot be expressed."""
LATENT = "multi-head latent attention is not translated; set model.attention.kind: mla and its widths by hand"
