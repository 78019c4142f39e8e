"""Marks for Locust's processes that the service was started for this run alone."""

from typing import Final

__all__ = ["OWN_SERVICE"]

#: In their environment. Like that service they read no `.env` then: it belongs to another.
OWN_SERVICE: Final = "LOADTESTS_OWN_SERVICE"
