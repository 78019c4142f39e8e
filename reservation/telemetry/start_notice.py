"""Tells the supervisor that this process is ready: one byte on the pipe it passed at the start."""

import os

__all__ = ["expect", "send"]

_descriptor: int | None = None


def expect(descriptor: int | None) -> None:
    """Keep the pipe of a supervisor that waits for the notice; None if none waits."""
    global _descriptor  # noqa: PLW0603 - a process starts once
    _descriptor = descriptor


def send() -> None:
    """Report readiness; has no effect the second time, or without a pipe."""
    global _descriptor
    if _descriptor is None:
        return
    descriptor, _descriptor = _descriptor, None
    try:
        os.write(descriptor, b"1")
    except BrokenPipeError:
        # The supervisor has stopped waiting, and ends this process.
        pass
    finally:
        os.close(descriptor)
