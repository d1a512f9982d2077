"""Tokenizers measured side by side on the same text."""
