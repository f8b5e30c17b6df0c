"""The training application around omerge_jax: models, data, losses, loop, command line."""
