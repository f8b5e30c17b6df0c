"""Scores of a model: held-out data, multiple choice, written answers and perplexity."""
