"""The numpy reference: forward only, float32 or float64; the oracle of conformance and parity."""
