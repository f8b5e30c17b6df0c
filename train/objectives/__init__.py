"""What a training step minimises: a loss applied to a model and a batch."""
