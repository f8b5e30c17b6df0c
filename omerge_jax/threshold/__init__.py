"""The k-th largest magnitude of each tensor: `edge` for any leaf, `bracketed` for large ones."""
