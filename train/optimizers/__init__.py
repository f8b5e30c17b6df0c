"""Optimizers and schedules built from their settings."""
