"""Numerical parity: where two backends, types or machines diverge, by how much, and whether it matters."""
