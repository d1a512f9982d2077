"""`moeport watch`: a page on this machine that follows runs while they train."""
