"""One command for a machine with real hardware: everything that moeport can check there, in one file to send back."""
