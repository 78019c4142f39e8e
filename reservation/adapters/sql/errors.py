"""SQL errors: an unfit database, and errors by cause: the row or the server."""

from typing import Final

import asyncpg  # pyright: ignore[reportMissingTypeStubs]
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError

__all__ = ["DatabaseUnfit", "is_outage", "is_row_error", "reason_of"]

#: SQLSTATE classes that a retry of the same row cannot pass: cardinality violation, data exception,
#: integrity constraint violation, program limit exceeded.
_ROW_ERRORS: Final = frozenset({"21", "22", "23", "54"})
#: SQLSTATE classes of a server that cannot serve now: connection exception, insufficient resources,
#: operator intervention (shutdown, cancellation), system error.
_OUTAGES: Final = frozenset({"08", "53", "57", "58"})
#: A server that is a standby, or was demoted to one.
_READ_ONLY: Final = "25006"


class DatabaseUnfit(OSError):
    """The database responds but must not be used; the message is one sentence with the reason.

    Args:
        sentence: the reason.
        row: its row in the readiness report.
    """

    def __init__(self, sentence: str, *, row: str = "sql") -> None:
        super().__init__(sentence)
        self.row = row


def is_row_error(error: DBAPIError) -> bool:
    """Whether the rows are the cause, so that a retry is useless.

    The asyncpg dialect maps few error classes: a character that the database cannot store arrives
    as a plain DBAPIError.
    """
    if isinstance(error, IntegrityError | DataError):
        return True
    # The driver itself rejects a value that fits no column, before it sends it.
    if isinstance(getattr(error.orig, "__cause__", None), asyncpg.DataError):
        return True
    return str(getattr(error.orig, "sqlstate", None))[:2] in _ROW_ERRORS


def is_outage(error: DBAPIError) -> bool:
    """Whether the server is the cause: it is away, shuts down, has no room or is a standby."""
    state = str(getattr(error.orig, "sqlstate", None))
    return state[:2] in _OUTAGES or state == _READ_ONLY


def reason_of(error: Exception) -> str:
    """One line for the log, without the parameter values in SQLAlchemy's message."""
    if isinstance(error, SQLAlchemyError):
        return type(error).__name__
    return " ".join(str(error).split()) or type(error).__name__
