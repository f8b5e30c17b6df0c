"""Faults put into real runs, and what becomes of them: `make faults`."""
