"""The drain of a process that is about to end: not ready, and still serving."""

__all__ = ["Draining"]


class Draining:
    """One process's state, shared by readiness, the answers and the connections."""

    __slots__ = ("active",)

    def __init__(self) -> None:
        self.active = False

    def begin(self) -> None:
        """From now on readiness is 503 and each answer closes its connection."""
        self.active = True
