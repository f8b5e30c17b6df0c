"""What merging costs next to ``optax.adamw``: ``make bench``."""
