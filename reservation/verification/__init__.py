"""Verification of a sale's history, counters and money."""
