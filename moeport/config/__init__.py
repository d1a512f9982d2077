"""Typed, frozen configuration with errors that name file, line and key."""
