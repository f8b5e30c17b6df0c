"""Training on answers that the model writes itself: rollouts, groups and rewards."""
