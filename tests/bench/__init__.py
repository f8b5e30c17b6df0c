"""The cost of merging next to ``optax.adamw``: ``make bench``."""
