"""Byte-level tokenizers: BPE, Scaffold-BPE (2404.17808) and LBPE (2411.05504)."""
