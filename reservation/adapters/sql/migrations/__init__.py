"""Numbered migrations; each one stays compatible with the code of the previous one."""
