"""Several processes and devices: joining, agreeing, the mesh, and placing batches on it."""
