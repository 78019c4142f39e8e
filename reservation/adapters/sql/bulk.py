"""Bulk inserts: many rows in one statement, in SQLite and PostgreSQL.

PostgreSQL takes each column as one array: one parse, one plan, one round trip for any number of
rows, four times as fast as a list of executions. SQLite runs its prepared statement over the rows
inside the driver.
"""

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, Final

import msgspec
from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Integer,
    Table,
    Text,
    any_,
    bindparam,
    func,
    literal,
    select,
    true,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["among", "among_few", "insert_into", "insert_new", "is_among", "texts", "upsert"]

#: Values of `among_few`: a scan of all rows costs less than more look-ups.
FEW_MAX: Final = 500

Rows = Sequence[tuple[Any, ...]]


def insert_into(dialect: str, table: Table) -> postgresql.Insert | sqlite.Insert:
    """An INSERT with ON CONFLICT, which each dialect implements with the same API."""
    if dialect == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def insert_new(connection: Connection, table: Table, rows: Rows) -> None:
    """Insert the rows whose primary key does not exist yet; each row has every column in order."""
    _insert(connection, table, rows, guard=None, update=False)


def upsert(
    connection: Connection, table: Table, rows: Rows, *, newer_by: str | None = None
) -> None:
    """Insert the rows, or overwrite those with the same primary key.

    Args:
        connection: in a transaction that writes.
        table: the table.
        rows: each with every column in order; no two with the same key.
        newer_by: a column that must be higher than the existing row's, or that row stays.
    """
    _insert(connection, table, rows, guard=newer_by, update=True)


def among(
    connection: Connection | AsyncConnection, column: Column[Any], values: Collection[str]
) -> ColumnElement[bool]:
    """An IN condition over any number of texts, with one statement text for all of them."""
    value = texts(connection.dialect.name, values)
    if connection.dialect.name == "postgresql":
        return column == any_(literal(value, ARRAY(Text)))
    each = func.json_each(literal(value)).table_valued("value")
    return column.in_(select(each.c.value))


def is_among(dialect: str, column: Column[Any], name: str) -> ColumnElement[bool]:
    """The condition of `among` with a parameter of this name, whose value `texts` gives.

    For statements that are built once: building one costs more than running it.
    """
    if dialect == "postgresql":
        return column == any_(bindparam(name, type_=ARRAY(Text)))
    # Named: an anonymous alias takes random bytes, which the repeat of a simulation would not take.
    each = func.json_each(bindparam(name, type_=Text)).table_valued("value", name=f"each_{name}")
    return column.in_(select(each.c.value))


def texts(dialect: str, values: Collection[str]) -> list[str] | str:
    """The value of the parameter of `is_among`."""
    if dialect == "postgresql":
        return list(values)
    # One parameter: SQLite takes no more than 32,766 of them in one statement.
    return msgspec.json.encode(list(values)).decode()


def among_few(
    connection: Connection | AsyncConnection, column: Column[Any], values: Collection[str] | None
) -> ColumnElement[bool]:
    """Like `among`; without a condition for None or for more than `FEW_MAX` values."""
    if values is None or len(values) > FEW_MAX:
        return true()
    return among(connection, column, values)


def _insert(
    connection: Connection, table: Table, rows: Rows, *, guard: str | None, update: bool
) -> None:
    if not rows:
        return
    dialect = connection.dialect.name
    statement = _statement(table, dialect, guard=guard, update=update)
    if dialect == "postgresql":
        columns = tuple(list(column) for column in zip(*rows, strict=True))
        connection.exec_driver_sql(statement, columns)
    else:
        connection.exec_driver_sql(statement, list(rows))


@cache
def _statement(table: Table, dialect: str, *, guard: str | None, update: bool) -> str:
    # Built from the tables' own names: no input is part of the statement's text.
    names = [column.name for column in table.columns]
    keys = [column.name for column in table.primary_key.columns]
    if dialect == "postgresql":
        arrays = ", ".join(
            f"${position}::{_pg_type(column)}[]"
            for position, column in enumerate(table.columns, start=1)
        )
        source = f"SELECT * FROM unnest({arrays})"  # noqa: S608
    else:
        source = f"VALUES ({', '.join('?' for _ in names)})"
    action = "DO NOTHING"
    if update:
        changes = ", ".join(f"{name} = excluded.{name}" for name in names if name not in keys)
        action = f"DO UPDATE SET {changes}"
        if guard is not None:
            action += f" WHERE {table.name}.{guard} < excluded.{guard}"
    return (
        f"INSERT INTO {table.name} ({', '.join(names)}) {source}"
        f" ON CONFLICT ({', '.join(keys)}) {action}"
    )


def _pg_type(column: Column[Any]) -> str:
    if isinstance(column.type, Boolean):
        return "boolean"
    if isinstance(column.type, Integer | BigInteger):
        return "bigint"
    return "text"
