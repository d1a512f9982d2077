"""Charts, HTML pages and the console for wide tables."""
