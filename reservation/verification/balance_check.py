"""Reconciliation of one sale: the audit, the orders in SQL and the PG's ledger.

The module does no I/O and trusts none of the three: its input comes over HTTP, as any client reads
it. The demo and the load test end with it, so both share one definition of an oversell.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec

from reservation.domain.ids import sale_of
from reservation.verification.model.event_data import BALANCE

__all__ = ["BalanceCheck", "Orders", "books_of", "disagreements", "unsettled"]

Rows = list[dict[str, Any]]
Orders = dict[str, dict[str, Any]]


class BalanceCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One sale, as each of the three records it."""

    #: The answer of the audit endpoint.
    audit: dict[str, Any]
    #: The orders in SQL, by their ids.
    orders: Orders
    #: The PG's ledger, this sale's entries only.
    entries: Rows

    @property
    def confirmed(self) -> Rows:
        """The orders that are sold."""
        return [order for order in self.orders.values() if order["status"] == "CONFIRMED"]

    @property
    def confirmed_amount(self) -> int:
        """The value of the confirmed orders."""
        return sum(order["amount"] for order in self.confirmed)

    @property
    def charged(self) -> int:
        """The amount the PG took, less deposits that the bank took back."""
        return sum(
            BALANCE[entry["kind"]] * entry["amount"]
            for entry in self.entries
            if entry["kind"] != "cancel"
        )

    @property
    def cancelled(self) -> int:
        """The amount that the PG refunded."""
        return sum(entry["amount"] for entry in self.entries if entry["kind"] == "cancel")

    def counted(self, name: str) -> int:
        """One of the counters, over all items."""
        return sum(row[name] for row in self.audit.get("skus", ()))


def books_of(
    sale_id: str, *, audit: dict[str, Any], orders: Iterable[dict[str, Any]], entries: Rows
) -> BalanceCheck:
    """The books of one sale, with the ledger's entries that name it.

    An entry belongs to the sale that its order id names, not to the orders in SQL: money
    taken for an order that SQL never saw must show.
    """
    own = [entry for entry in entries if sale_of(entry["orderId"]) == sale_id]
    return BalanceCheck(
        audit=audit, orders={order["orderId"]: order for order in orders}, entries=own
    )


def disagreements(books: BalanceCheck) -> list[str]:
    """Everything on which the books differ; empty when they agree."""
    found = [f"audit: {problem}" for problem in books.audit.get("problems", ())]
    if not books.audit.get("ok", False) and not found:
        found.append(f"the audit is not clean: {books.audit.get('code', 'no code')}")
    return [*found, *_stock(books), *_money(books)]


def unsettled(books: BalanceCheck) -> list[str]:
    """Holds that have not ended, and events that SQL does not have; empty once a sale is over."""
    held, lag = books.counted("held"), books.audit.get("lag", 0)
    return [f"{held} still held and {lag} events behind"] if held or lag else []


def _stock(books: BalanceCheck) -> list[str]:
    found: list[str] = []
    sold_in_sql: Counter[str] = Counter()
    for order in books.confirmed:
        for line in order["items"]:
            sold_in_sql[line["sku"]] += line["quantity"]
    for row in books.audit.get("skus", ()):
        sku, total, sold = row["sku"], row["total"], row["sold"]
        if sold > total or sold_in_sql[sku] > total:
            found.append(f"{sku}: oversold, {max(sold, sold_in_sql[sku])} sold of {total}")
        if min(row["available"], row["held"], sold) < 0:
            found.append(f"{sku}: negative counter: {row}")
        if total != row["available"] + row["held"] + sold:
            found.append(f"{sku}: {total} is not the sum of available, held and sold: {row}")
        if sold != sold_in_sql[sku]:
            found.append(f"{sku}: {sold} counted as sold, {sold_in_sql[sku]} in confirmed orders")
    unknown = sold_in_sql.keys() - {row["sku"] for row in books.audit.get("skus", ())}
    return found + [f"{sku}: sold in SQL, missing in the audit" for sku in sorted(unknown)]


def _money(books: BalanceCheck) -> list[str]:
    found: list[str] = []
    if books.charged - books.cancelled != books.confirmed_amount:
        found.append(
            f"the PG charged {books.charged} and refunded {books.cancelled}, the confirmed "
            f"orders total {books.confirmed_amount}"
        )
    balance: Counter[str] = Counter()
    charges: Counter[str] = Counter()
    for entry in books.entries:
        balance[entry["orderId"]] += BALANCE[entry["kind"]] * entry["amount"]
        charges[entry["orderId"]] += entry["kind"] in {"charge", "deposit"}
    owed = Counter({order["orderId"]: order["amount"] for order in books.confirmed})
    wrong = [order for order in sorted({*balance, *owed}) if balance[order] != owed[order]]
    found += [
        f"{order}: the PG's balance is {balance[order]}, the order's amount {owed[order]}"
        for order in wrong
    ]
    twice = [order for order in owed if charges[order] > 1]
    return found + [f"{order}: charged {charges[order]} times" for order in twice]
