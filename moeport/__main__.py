"""`python -m moeport`."""

from moeport.cli.main import main

main()
