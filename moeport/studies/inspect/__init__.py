"""What the routers of a trained model have learned, on held-out text."""
