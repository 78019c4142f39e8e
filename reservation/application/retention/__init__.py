"""Retention: removes the data of ended sales from Redis."""
