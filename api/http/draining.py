"""The drain of a process before shutdown: not ready, and still serving."""

__all__ = ["Draining"]


class Draining:
    """Drain state of one process, shared by readiness, responses and connections."""

    __slots__ = ("active",)

    def __init__(self) -> None:
        self.active = False

    def begin(self) -> None:
        """Start the drain: readiness is 503, and each response closes its connection."""
        self.active = True
