"""Recovery of a sale's state in Redis from SQL."""
