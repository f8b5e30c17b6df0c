"""The benchmark on a small language model."""
