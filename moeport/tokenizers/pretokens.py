"""Text cut into pre-tokens, which merges never cross."""

from __future__ import annotations

from moeport.tokenizers.patterns import PATTERNS

__all__ = ["PATTERNS"]
