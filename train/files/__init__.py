"""Files on disk: written whole, checked by hash, locked, and laid out in a run directory."""
