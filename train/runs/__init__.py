"""One training run: its checks, its start weights, its loop and its export."""
