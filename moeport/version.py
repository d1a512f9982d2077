"""The version of moeport."""

VERSION = "0.1.0.dev0"
