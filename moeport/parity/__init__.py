"""Numerical parity: where two backends, types or machines part, by how much, and whether it matters."""
