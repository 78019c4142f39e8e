"""The error of a database that responds but must not be used."""

__all__ = ["DatabaseUnfit"]


class DatabaseUnfit(OSError):
    """The database responds but must not be used; the message is one sentence with the reason.

    Args:
        sentence: the reason.
        row: its row in the readiness report.
    """

    def __init__(self, sentence: str, *, row: str = "sql") -> None:
        super().__init__(sentence)
        self.row = row
