"""Text from a model: sampling with a cache, filters and greedy answers."""
