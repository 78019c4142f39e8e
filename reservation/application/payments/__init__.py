"""Payments: confirmation, settlement, notifications and refunds."""
