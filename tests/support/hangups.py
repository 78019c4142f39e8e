"""SIGHUP for the services under test, even when the tests run under `nohup`."""

import signal

__all__ = ["pass_on_hangups"]


def pass_on_hangups() -> None:
    """Handle SIGHUP without effect where it is ignored.

    A process inherits an ignored signal, and `reservation serve` respects that. It does not inherit
    a handler.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
