"""Readiness: the conditions under which holds are promised."""
