"""A database that answers and must not be used."""

__all__ = ["LedgerUnfit"]


class LedgerUnfit(OSError):
    """The database answers, and must not be used: one sentence says why.

    Args:
        sentence: why.
        row: its name in readiness.
    """

    def __init__(self, sentence: str, *, row: str = "sql") -> None:
        super().__init__(sentence)
        self.row = row
