"""Sparsifiers F, one family a module; `omerge_jax.sparsifiers.base` says what they have in common."""
