"""The command line: one module per command, each of which imports what it needs when it runs."""
