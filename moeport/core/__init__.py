"""What a mixture-of-experts model is, in terms of an Ops object; imports no framework."""
