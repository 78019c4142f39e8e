"""Speed of `reservation verify`: a synthetic history of a whole sale, all of it true."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.support.run import Goal, Run, Section
from reservation.domain.events import GENESIS, chain_of
from reservation.verification.model.history_format import (
    VERSION,
    End,
    EventLine,
    Head,
    History,
    Operation,
    Record,
)
from reservation.verification.model.report import Judgement
from reservation.verification.verify import verify

__all__ = ["made_up", "measure", "write_history"]

_EVENTS: Final = 1_000_000
_EVENTS_QUICK: Final = 20_000
_WANTED: Final = 300_000
_SALE: Final = "made-up"
_SKUS: Final = 50
_PRICE: Final = 19_000
_OPENED_MS: Final = 1_800_000_000_000
_CLOSES_MS: Final = _OPENED_MS + 86_400_000
#: One event each millisecond, and a head every this many events.
_EVENT_NS: Final = 1_000_000
_EVENTS_PER_HEAD: Final = 20
#: One order in this many is released; the others are paid.
_LEAVES: Final = 3


def measure(run: Run) -> Section:
    """Write a history, then judge it: once alone, once with all its answers."""
    count = _EVENTS_QUICK if run.quick else _EVENTS
    rows: list[list[str]] = []
    data: dict[str, float] = {}
    for name, operations in (("events alone", False), ("with every answer", True)):
        path = run.home / "history.jsonl"
        write_history(path, made_up(count, operations=operations))
        seconds, judgement = _judged(path)
        rate = judgement.events / seconds
        data[name] = rate
        size = f"{path.stat().st_size / 1e6:,.0f}"
        answers = f"{judgement.answers + judgement.heads:,}"
        events = f"{judgement.events:,}"
        rows.append([name, events, answers, size, f"{seconds:.2f}", f"{rate:,.0f}"])
        path.unlink()
    rate = data["events alone"]
    return Section(
        title="The judge of a recorded history",
        columns=["history", "events", "answers and observations", "MB", "seconds", "events/s"],
        rows=rows,
        goals=[Goal("events judged", f"{rate:,.0f}/s", f">= {_WANTED:,}/s", rate >= _WANTED)],
        data=data,
    )


def _judged(path: Path) -> tuple[float, Judgement]:
    began = time.perf_counter()
    judgement = verify(path)
    seconds = time.perf_counter() - began
    if not judgement.ok:
        raise RuntimeError(f"a true history is judged false: {judgement.violations[0]}")
    return seconds, judgement


def write_history(path: Path, records: Iterator[Record]) -> None:
    """One record a line."""
    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:
        for record in records:
            file.write(encoder.encode(record) + b"\n")


def made_up(events: int, *, operations: bool) -> Iterator[Record]:
    """The lines of a sale with at least this number of events.

    Args:
        events: two of three orders have three of them, the others two.
        operations: whether it has each call, with heads, or the events alone.
    """
    yield History(version=VERSION, unix_ms=_OPENED_MS, monotonic_ns=0)
    reported = list(_rows(events))
    if operations:
        yield from _calls(reported)
    yield from _chained(reported)
    yield End(sale=_SALE, seq=len(reported))


_CLAIMED: Final = b'{"from":"HELD","to":"CONFIRMING","fence":1,"paymentKey":"%b","leaseUntil":%d}'
_CONFIRMED: Final = (
    b'{"from":"CONFIRMING","to":"CONFIRMED","fence":1,"payment":{"method":"card","status":"DONE"}}'
)
_RELEASED: Final = b'{"from":"HELD","to":"RELEASED","cause":"the buyer left"}'

#: An event's name, its order's id, its number among the orders, and its data.
_Row = tuple[str, str, int, bytes]


def _rows(events: int) -> Iterator[_Row]:
    yield "sale_put", "", 0, _sale_data(events)
    count = number = 0
    while count < events:
        number += 1
        order = f"{_SALE}-{number:032x}"
        yield "prepared", order, number, _prepared_data(number)
        if number % _LEAVES:
            key = f"tgen-{number:024x}"
            yield "claimed", order, number, _CLAIMED % (key.encode(), _CLOSES_MS)
            yield "confirmed", order, number, _CONFIRMED
            count += 3
        else:
            yield "released", order, number, _RELEASED
            count += 2


def _sale_data(events: int) -> bytes:
    items = [
        {"sku": f"piece-{number}", "name": "Piece", "price": _PRICE, "total": events, "limit": 2}
        for number in range(_SKUS)
    ]
    sale = {
        "name": "Made up",
        "currency": "KRW",
        "opensAt": _OPENED_MS,
        "closesAt": _CLOSES_MS,
        "holdSeconds": 300,
        "holdPolicy": "prepare",
        "virtualAccounts": False,
        "requireAdmission": False,
        "items": items,
        "operator": "benchmark",
        "version": 1,
        "epoch": "e",
    }
    return msgspec.json.encode(sale)


def _prepared_data(number: int) -> bytes:
    facts = {
        "from": "",
        "to": "HELD",
        "items": [[f"piece-{number % _SKUS}", 1, _PRICE]],
        "amount": _PRICE,
        "digest": f"{number:032x}",
        "expiresAt": _CLOSES_MS,
        "buyer": f"guest-{number:022x}",
        "name": "Piece",
    }
    return msgspec.json.encode(facts)


def _chained(reported: list[_Row]) -> Iterator[EventLine]:
    chain = GENESIS
    for seq, (event, order, _, content) in enumerate(reported, 1):
        at_ms, data = _OPENED_MS + seq, content.decode()
        chain = chain_of(chain, seq=seq, event=event, order_id=order, at_ms=at_ms, data=data)
        yield EventLine(
            sale=_SALE,
            seq=seq,
            event=event,
            order=order,
            at=at_ms,
            data=data,
            chain=chain,
        )


def _calls(reported: list[_Row]) -> Iterator[Record]:
    """A call around each event but the claims, which are within the call that ends as confirmed."""
    for seq, (event, order, number, _) in enumerate(reported, 1):
        at_ns = seq * _EVENT_NS
        if seq % _EVENTS_PER_HEAD == 0:
            yield Head(sale=_SALE, invoked_ns=at_ns + 1, answered_ns=at_ns + 2, seq=seq)
        if event in ("sale_put", "claimed"):
            continue
        call = Operation(
            sale=_SALE,
            client=f"client-{number % 100}",
            operation="prepare",
            invoked_ns=at_ns - 100_000,
            answered_ns=at_ns + 100_000,
            order=order,
            status=200,
        )
        if event == "prepared":
            call.status, call.reported, call.amount, call.seq = 201, "HELD", _PRICE, seq
            call.buyer, call.lines = f"guest-{number:022x}", [(f"piece-{number % _SKUS}", 1)]
        elif event == "confirmed":
            call.operation, call.reported = "success", "CONFIRMED"
        else:
            call.operation, call.reported = "release", "RELEASED"
        yield call
