"""Comparison of SQL with the gateway's own list of transactions."""
