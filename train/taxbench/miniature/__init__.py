"""The benchmark's miniature: tasks, a tiny model, its training and its demo."""
