"""Prints the service's responses as tables; as plain text if stdout is not a terminal."""

from collections.abc import Sequence
from typing import Any, Final

from rich import markup
from rich.console import Console
from rich.table import Table

from reservation.domain.text import printable

__all__ = [
    "show_audit",
    "show_delivery",
    "show_differences",
    "show_endpoint",
    "show_endpoints",
    "show_events",
    "show_item",
    "show_key",
    "show_keys",
    "show_new_endpoint",
    "show_new_key",
    "show_order",
    "show_purges",
    "show_refund",
    "show_refunds",
    "show_sale",
    "show_sale_history",
    "show_sales",
    "show_state",
]

#: Wide enough that nothing is cut: a truncated id is of no use, and terminals wrap.
_WIDTH: Final = 1_000

_COUNTERS: Final = ("total", "available", "held", "sold")


def show_sales(answer: dict[str, Any]) -> None:
    """One line a sale."""
    names = ("saleId", "name", "status", "opensAt", "closesAt")
    _print_table(names, [[sale[name] for name in names] for sale in answer["sales"]])


def show_sale(sale: dict[str, Any]) -> None:
    """A sale and its items with their counters."""
    console = _console()
    title = f"{sale['saleId']}: {sale['name']}, {sale['status']}, {sale['currency']}"
    console.print(escape(title))
    console.print(escape(f"{sale['opensAt']} to {sale['closesAt']}"))
    names = ("sku", "name", "price", *_COUNTERS, "limitPerBuyer")
    _print_table(names, [[item.get(name, "") for name in names] for item in sale["items"]])


def show_audit(report: dict[str, Any]) -> None:
    """The audit's result for each item, and the lag of SQL."""
    names = ("sku", "total", "available", "held", "confirming", "sold", "ok")
    rows = [[_yes_or_no(row[name]) for name in names] for row in report["skus"]]
    _print_table(names, rows)
    console = _console()
    for problem in report["problems"]:
        console.print(escape(f"problem: {problem}"))
    verdict = "consistent" if report["ok"] else "discrepancies found"
    console.print(f"{verdict}; events not in SQL yet: {report['lag']}")


def show_differences(differences: Sequence[dict[str, Any]]) -> None:
    """One line a payment."""
    names = ("orderId", "kind", "ours", "theirs", "amount", "currency")
    rows = [[*(one[name] for name in names), one["paymentKey"][-4:]] for one in differences]
    _print_table((*names, "paymentKeyLast4"), rows)


def show_purges(reports: Sequence[dict[str, Any]], *, dry_run: bool) -> None:
    """One line a sale, with the numbers of rows."""
    names = ("saleId", "orders", "events", "movements", "answers", "refusal")
    _print_table(names, [[one[name] for name in names] for one in reports])
    count = sum(not one["refusal"] for one in reports)
    verdict = "would be purged; nothing was changed" if dry_run else "purged"
    _console().print(f"{count} of {len(reports)} sales {verdict}")


def show_order(order: dict[str, Any]) -> None:
    """An order: its buyer and items, its history, and its next step."""
    console = _console()
    items = ", ".join(f"{line['quantity']} x {line['sku']}" for line in order["items"])
    console.print(escape(f"{order['orderId']}: {order['status']} since {order['updatedAt']}"))
    console.print(
        escape(f"{items} for {order['amount']} {order['currency']}, buyer {order['buyerId']}")
    )
    if account := order.get("virtualAccount"):
        where = f"{account['bankEnglish']} ({account['bank']}) {account['accountNumber']}"
        console.print(
            escape(f"awaits a deposit to {where}, {account['holderName']}, by {account['dueAt']}")
        )
    if (refund := order.get("refund")) and refund["status"] != "done":
        console.print(escape(_refund_summary(refund)))
    rows = [
        [entry["at"], entry["kind"], entry["what"], _compact(entry["facts"])]
        for entry in order["history"]
    ]
    _print_table(("at", "kind", "what", "facts"), rows)
    console.print(escape(f"next: {order['next']}"))


def show_item(item: dict[str, Any]) -> None:
    """An item: its counters, its holders, the next deadlines, the payments in progress."""
    console = _console()
    counters = ", ".join(f"{item[name]} {name}" for name in _COUNTERS)
    console.print(escape(f"{item['saleId']}/{item['sku']}: {counters}"))
    for title, name, columns in (
        ("holders", "holders", ("buyerId", "quantity", "orders", "since")),
        ("next deadlines", "nextDeadlines", ("until", "orderId", "buyerId", "quantity", "since")),
        ("payments undecided", "undecided", ("until", "orderId", "buyerId", "quantity", "since")),
    ):
        console.print(f"{title}: {len(item[name]) or 'none'}")
        if item[name]:
            _print_table(columns, [[row[column] for column in columns] for row in item[name]])


def show_state(order: dict[str, Any]) -> None:
    """The state of an order after a request."""
    waits = {
        "CONFIRMING": "; the payment is undecided, and settlement continues",
        "AWAITING_DEPOSIT": "; the account is open, and settlement continues",
    }
    text = f"{order['orderId']}: {order['status']}{waits.get(order['status'], '')}"
    _console().print(escape(text))


def show_sale_history(answer: dict[str, Any]) -> None:
    """One line a change; where there are more, the cursor of the next page."""
    rows = [
        [one["at"], one["what"], one["operator"] or "", one["reason"] or "", _compact(one["facts"])]
        for one in answer["changes"]
    ]
    _print_table(("at", "what", "operator", "reason", "facts"), rows)
    _show_more(answer)


_KEY_COLUMNS: Final = ("keyId", "name", "role", "hint", "createdAt", "createdBy", "revokedAt")


def show_keys(answer: dict[str, Any]) -> None:
    """One line a key; where there are more, the cursor of the next page."""
    _print_keys(answer["keys"])
    _show_more(answer)


def show_key(key: dict[str, Any]) -> None:
    """One key, without the key itself."""
    _print_keys([key])


def show_new_key(key: dict[str, Any]) -> None:
    """A key that was just created, alone on its line."""
    _print_keys([key])
    _console().print("the key, shown only now:")
    _console().print(escape(key["key"]))


def _print_keys(keys: Sequence[dict[str, Any]]) -> None:
    _print_table(_KEY_COLUMNS, [[key[name] or "" for name in _KEY_COLUMNS] for key in keys])


def _show_more(answer: dict[str, Any]) -> None:
    if answer["nextCursor"]:
        _console().print(escape(f"more: --cursor {answer['nextCursor']}"))


def show_refund(order: dict[str, Any]) -> None:
    """The state of the order after the refund."""
    pending = order.get("code") == "refund_pending"
    word = order.get("providerCode")
    answered = f"the PG's last answer was {word}" if word else "the PG has not answered yet"
    state = f"{answered}; the service retries" if pending else order["status"]
    _console().print(escape(f"{order['orderId']}: {state}"))


def show_refunds(answer: dict[str, Any]) -> None:
    """One line a refund; where there are more, the cursor of the next page."""
    names = ("orderId", "status", "createdAt", "operator", "reason", "restock", "providerCode")
    rows = [[_yes_or_no(one[name] or "") for name in names] for one in answer["refunds"]]
    _print_table(names, rows)
    _show_more(answer)


def show_events(answer: dict[str, Any]) -> None:
    """One line an event, and the position of the next page."""
    names = ("id", "at", "saleId", "seq", "type", "orderId")
    _print_table(names, [[one[name] or "" for name in names] for one in answer["events"]])
    _console().print(f"next: --after {answer['next']}")


def show_endpoints(answer: dict[str, Any]) -> None:
    """One line an endpoint."""
    names = ("id", "url", "events", "saleId", "state", "failingSince", "position")
    rows = [
        {**one, "events": ",".join(one["events"]), "state": _endpoint_state(one)}
        for one in answer["endpoints"]
    ]
    _print_table(names, [[row[name] or "" for name in names] for row in rows])


def show_endpoint(endpoint: dict[str, Any]) -> None:
    """An endpoint's address and state."""
    state = f"{endpoint['id']}: {endpoint['url']}, {_endpoint_state(endpoint)}"
    _console().print(escape(f"{state}, deliveries exist up to event {endpoint['position']}"))


def show_new_endpoint(endpoint: dict[str, Any]) -> None:
    """A new endpoint, with its secret."""
    show_endpoint(endpoint)
    _console().print(escape(f"secret: {endpoint['secret']}"))


def show_delivery(delivery: dict[str, Any]) -> None:
    """A delivery and its state."""
    words = f"{delivery['webhookId']}: {delivery['type']}, {delivery['status']}"
    _console().print(escape(words))


def _endpoint_state(endpoint: dict[str, Any]) -> str:
    if endpoint["enabled"]:
        return "enabled"
    return f"disabled ({endpoint['disabledReason'] or 'by an operator'})"


def _refund_summary(refund: dict[str, Any]) -> str:
    to = refund["refundReceiveAccount"]
    account = f" to {to['bank']} {to['accountNumber']} {to['holderName']}" if to else ""
    units = "back on sale" if refund["restock"] else "not returned to the sale"
    words = f"refund {refund['status']}{account}, units {units}, by {refund['operator']}"
    return words + (f": {refund['providerCode']}" if refund["providerCode"] else "")


def escape(text: str) -> str:
    """Text made safe for a terminal: a buyer's name must not carry controls or markup."""
    return markup.escape(printable(text))


def _compact(facts: dict[str, Any]) -> str:
    members = [f"{name}={value}" for name, value in facts.items() if name != "explanation"]
    return " ".join([*filter(None, [facts.get("explanation")]), *members])


def _yes_or_no(value: Any) -> Any:
    return {True: "yes", False: "NO"}[value] if isinstance(value, bool) else value


def _console() -> Console:
    # rich drops colours by itself if NO_COLOR is set or stdout is not a terminal.
    return Console(width=_WIDTH, highlight=False)


def _print_table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in names:
        number = all(isinstance(row[names.index(name)], int) for row in rows)
        table.add_column(name, justify="right" if number and rows else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(str(value)) for value in row))
    _console().print(table)
