"""The training application: models, data, losses, the loop and the command line around omerge_jax."""
