"""The limit of open files: raised to the hard limit at start, a warning where it is still low."""

import resource
from typing import Final

import structlog

__all__ = ["LOW", "limit", "raise_limit", "warnings"]

log = structlog.get_logger(__name__)

#: An opening second has thousands of connections, and each one is a file.
LOW: Final = 8_192


def raise_limit() -> None:
    """Raise the soft limit to the hard one; processes that start later inherit it.

    Shells and service managers set the soft limit to 1,024 for programs that use select(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        # macOS takes less than the hard limit that it reports.
        log.warning("file_limit_not_raised", soft=soft, hard=hard, reason=str(error))


def limit() -> int:
    """The most files that this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft


def warnings() -> list[str]:
    """`file-limit-low` where the limit bounds the service before anything else does."""
    return ["file-limit-low"] if limit() < LOW else []
