"""Prepare without the framework in between."""
