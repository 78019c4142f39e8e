"""Reports the readiness of this process to the supervisor: one byte on an inherited pipe."""

import os

__all__ = ["expect", "send"]

_descriptor: int | None = None


def expect(descriptor: int | None) -> None:
    """Store the pipe of a supervisor that waits for the notice; None if none waits."""
    global _descriptor  # noqa: PLW0603 - a process starts once
    _descriptor = descriptor


def send() -> None:
    """Report readiness; only the first call has an effect, and only with a pipe."""
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
