"""Mutants that live, and why that is right: each is the same script in all that can be told."""

import re

__all__ = ["reason_to_live"]

#: What the mutants of a kind have in common, and why no test can tell them apart.
LIVING: tuple[tuple[str, str], ...] = (
    (
        r"not_after.* -> > becomes >=$",
        "differs in the one millisecond at which a call is just not too late yet",
    ),
)


def reason_to_live(name: str) -> str | None:
    """Why this mutant may live, or None."""
    return next((reason for pattern, reason in LIVING if re.search(pattern, name)), None)
