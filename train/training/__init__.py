"""The train step, its loop, and what a loop saves and watches."""
