"""Studies of many methods and seeds on the miniature, and their report."""
