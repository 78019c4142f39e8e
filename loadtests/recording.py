"""Recording of a run for the history checker: calls with answers, heads, and the ledger."""

import time
from base64 import urlsafe_b64decode
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import msgspec
import redis

from reservation.adapters.redis.embedded.files import socket_path_of
from reservation.adapters.redis.keys import Keys
from reservation.config.settings import Settings
from reservation.verification.model.history_format import (
    DECODER,
    VERSION,
    End,
    Head,
    History,
    MoneyLine,
    Operation,
    Record,
)

__all__ = ["Call", "Heads", "operation_of", "write_history"]

#: A slower poll is useless: the service is in trouble, and the run continues.
_OBSERVE_SECONDS_MAX: Final = 2.0
#: The member of a token's payload that has the sale's head.
_SEQ_IN_TOKEN: Final = 7


class Call(msgspec.Struct, kw_only=True):
    """One request and its answer, as its client has them."""

    sale: str
    client: str
    buyer: str
    method: str
    url: str
    body: Mapping[str, Any] | None
    invoked_ns: int
    answered_ns: int | None
    #: 0 if there was no response.
    status: int
    answer: Mapping[str, Any]
    replayed: bool


def operation_of(call: Call) -> Operation | None:
    """A call as the history has it; None for one that is none of its operations."""
    url = urlsplit(call.url)
    path, query = url.path, parse_qs(url.query)
    found = Operation(
        sale=call.sale,
        client=call.client,
        operation="prepare",
        buyer=call.buyer,
        invoked_ns=call.invoked_ns,
        answered_ns=call.answered_ns if call.status else None,
        status=call.status,
        replayed=call.replayed,
    )
    match call.method, path.strip("/").split("/"):
        case "POST", ["v1", "sales", _, "reservations"]:
            body = call.body or {}
            found.lines = [(line["sku"], line["quantity"]) for line in body.get("items", [])]
            found.amount = body.get("amount", 0)
        case "GET", ["v1", "payments", "toss", "success"]:
            found.operation = "success"
            found.order = query.get("orderId", [""])[0]
            found.payment_key = query.get("paymentKey", [""])[0]
            amount = query.get("amount", [""])[0]
            found.amount = int(amount) if amount.isdecimal() else 0
        case "GET", ["v1", "payments", "toss", "fail"]:
            found.operation = "fail"
        case "POST", ["v1", "reservations", order, "release"]:
            found.operation, found.order = "release", order
        case "GET", ["v1", "reservations", order]:
            found.operation, found.order = "read", order
        case _:
            return None
    _add_answer(found, call.answer)
    return found


def _add_answer(found: Operation, answer: Mapping[str, Any]) -> None:
    """Copy the facts of the answer, about a reservation or the reason for none."""
    if "code" in answer:
        found.code = str(answer["code"])
        found.available = answer.get("available", {})
        found.sku, found.limit = answer.get("sku", ""), answer.get("limit", 0)
        found.taken, found.expected_amount = answer.get("taken", 0), answer.get("expectedAmount", 0)
        return
    found.order = found.order or answer.get("orderId", "")
    found.reported = answer.get("status", "")
    found.amount = answer.get("amount", found.amount)
    if found.operation == "prepare" and not found.replayed and "token" in answer:
        found.seq = _seq_in(answer["token"])


def _seq_in(token: str) -> int:
    """The sale's head when a new order's token was made: the number of its own event."""
    payload = token.split(".")[2]
    members = msgspec.json.decode(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return int(members[_SEQ_IN_TOKEN])


class Heads:
    """Polls of a sale in Redis from outside: its head and its counters at one instant."""

    def __init__(self, settings: Settings, sale_id: str, skus: Iterable[str]) -> None:
        url = settings.redis_url or f"unix://{socket_path_of(settings.data_dir.absolute())}"
        # The library's own types are incomplete.
        self._redis: Any = redis.Redis.from_url(  # pyright: ignore[reportUnknownMemberType]
            url,
            decode_responses=True,
            socket_timeout=_OBSERVE_SECONDS_MAX,
            socket_connect_timeout=_OBSERVE_SECONDS_MAX,
        )
        self._sale_id = sale_id
        self._keys = Keys(settings.key_prefix).of(sale_id)
        self._skus = list(skus)

    def observe(self) -> Head:
        """The current head of the sale.

        Raises:
            redis.RedisError: the head cannot be read.
        """
        invoked_ns = time.monotonic_ns()
        with self._redis.pipeline(transaction=True) as together:
            together.hget(self._keys.sale, "seq")
            for sku in self._skus:
                together.hmget(self._keys.stock(sku), "total", "available", "held", "sold")
            seq, *rows = together.execute()
        counted = [
            (int(total), int(available), int(held), int(sold))
            for total, available, held, sold in rows
            if None not in (total, available, held, sold)
        ]
        return Head(
            sale=self._sale_id,
            invoked_ns=invoked_ns,
            answered_ns=time.monotonic_ns(),
            seq=int(seq or 0),
            stock=dict(zip(self._skus, counted, strict=False)),
        )

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()


def write_history(
    path: Path,
    *,
    calls: Iterable[Operation | Head],
    past: bytes,
    entries: Iterable[Mapping[str, Any]] | None,
) -> None:
    """Write the whole recording to one file.

    Args:
        path: the file.
        calls: the clients' calls with their answers, and the heads.
        past: the output of `reservation history`.
        entries: the PG's ledger of this sale; None if it is incomplete.
    """
    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:

        def write(record: Record) -> None:
            file.write(encoder.encode(record) + b"\n")

        exported = DECODER.decode_lines(past)
        # The calls' clock is the recorder's own.
        now_ns = time.monotonic_ns()
        first = History(
            version=VERSION,
            unix_ms=time.time_ns() // 1_000_000,
            monotonic_ns=now_ns,
            replicas_acknowledge=any(
                record.replicas_acknowledge for record in exported if isinstance(record, History)
            ),
        )
        write(first)
        for call in calls:
            write(call)
        for record in exported:
            if isinstance(record, History):
                continue
            if isinstance(record, End) and entries is not None:
                for entry in entries:
                    write(_money(record.sale, entry))
                record.money = True
            write(record)


def _money(sale_id: str, entry: Mapping[str, Any]) -> MoneyLine:
    return MoneyLine(
        sale=sale_id, order=entry["orderId"], entry=entry["kind"], amount=entry["amount"]
    )
