"""The open-file limit: raised to the hard limit at start, with a warning if still low."""

import resource
from typing import Final

import structlog

__all__ = ["LOW", "limit", "raise_limit", "warnings"]

log = structlog.get_logger(__name__)

#: A sale's opening brings thousands of connections, and each one is a file.
LOW: Final = 8_192


def raise_limit() -> None:
    """Raise the soft limit to the hard limit; later child processes inherit it.

    Shells and service managers set the soft limit to 1,024 for programs that use select(2).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        # macOS accepts less than the hard limit that it reports.
        log.warning("file_limit_not_raised", soft=soft, hard=hard, reason=str(error))


def limit() -> int:
    """The maximum number of files that this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft


def warnings() -> list[str]:
    """`file-limit-low` where the open-file limit is the first bottleneck."""
    return ["file-limit-low"] if limit() < LOW else []
