"""Differences in SQL: any number of them is stored and settled."""

from reservation.adapters.sql.differences import Difference, DifferenceKind
from reservation.adapters.sql.store import SqlStore

#: More than the parameters that any build of SQLite takes in one statement.
MANY = 300_000


def difference(number: int) -> Difference:
    return Difference(
        gateway="toss",
        payment_key=f"key-{number}",
        order_id=f"s-{number:024}",
        kind=DifferenceKind.SETTLED_LATER,
        ours="",
        theirs="DONE",
        amount=1_000,
        currency="KRW",
        found_at_ms=1,
    )


async def test_more_differences_are_settled_than_a_statement_has_parameters(sql: SqlStore) -> None:
    found = [difference(number) for number in range(1_001)]
    await sql.differences.put(found)
    assert await sql.differences.list_open() == found
    await sql.differences.settle([f"key-{number}" for number in range(1, MANY)])
    assert await sql.differences.list_open() == found[:1]
