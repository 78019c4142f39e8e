"""Draining of a process: it still serves, and closes each connection after its response."""

__all__ = ["Draining"]


class Draining:
    """Drain state of one process, shared by readiness, responses and connections."""

    __slots__ = ("active", "ready")

    def __init__(self) -> None:
        self.active = False
        #: False before a shutdown. During a replacement other processes serve the port, so the
        #: service stays ready.
        self.ready = True

    def begin(self) -> None:
        """Drain before shutdown: readiness is 503, and each response closes its connection."""
        self.active = True
        self.ready = False

    def retire(self) -> None:
        """Drain before replacement: each response closes its connection."""
        self.active = True
