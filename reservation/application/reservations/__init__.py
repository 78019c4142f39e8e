"""Reservations: prepare, read, wait and release."""
