"""Configs of other training frameworks to moeport's: every key is understood, ignored for a reason, or refused."""
