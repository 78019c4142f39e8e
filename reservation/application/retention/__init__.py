"""Retention: how long the data of a sale stays in Redis."""
