"""The model: attention, capacity, the mixture-of-experts layer, transformers."""
