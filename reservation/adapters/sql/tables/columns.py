"""Columns, conditions and indexes that the tables share, and the metadata that has them all."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import BigInteger, Column, Index, MetaData, Text, text

__all__ = ["Id", "metadata", "one_of", "only_where", "required"]

#: Ids compare by bytes in both databases, whatever the locale of PostgreSQL: pages have the same
#: order, and indexes use fast byte comparison.
Id = Text().with_variant(Text(collation="C"), "postgresql")

metadata = MetaData()


def one_of(column: str, words: Iterable[str]) -> str:
    quoted = ", ".join(f"'{word}'" for word in words)
    return f"{column} IN ({quoted})"


def required(kind: type[Text | BigInteger] | Text, *names: str) -> list[Column[Any]]:
    """Columns of one type that are never NULL."""
    return [Column(name, kind, nullable=False) for name in names]


def only_where(name: str, *columns: str, condition: str, unique: bool = False) -> Index:
    """A partial index."""
    return Index(
        name,
        *columns,
        unique=unique,
        postgresql_where=text(condition),
        sqlite_where=text(condition),
    )
