"""Errors of SQL by whose fault they are: a row that it cannot take, or the server."""

from typing import Final

import asyncpg  # pyright: ignore[reportMissingTypeStubs]
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError

__all__ = ["is_of_the_row", "reason_of"]

#: SQLSTATE classes that the same row meets again however often it is sent: cardinality violation,
#: data exception, integrity constraint violation, program limit exceeded.
_OF_THE_ROW: Final = frozenset({"21", "22", "23", "54"})


def is_of_the_row(error: DBAPIError) -> bool:
    """Whether the rows are the cause, so that repeating them is useless.

    The dialect of asyncpg maps few classes of its errors: a character that the database cannot
    store arrives as a plain DBAPIError.
    """
    if isinstance(error, IntegrityError | DataError):
        return True
    # The driver refuses a value that fits into no column before it is sent.
    if isinstance(getattr(error.orig, "__cause__", None), asyncpg.DataError):
        return True
    return str(getattr(error.orig, "sqlstate", None))[:2] in _OF_THE_ROW


def reason_of(error: Exception) -> str:
    """One line for the log; without the values that SQLAlchemy puts into its own."""
    if isinstance(error, SQLAlchemyError):
        return type(error).__name__
    return " ".join(str(error).split()) or type(error).__name__
