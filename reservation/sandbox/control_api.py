"""Control API: the sandbox's endpoints for tests and operators, in addition to the PG's."""

from typing import Annotated, Literal

import msgspec
from litestar import delete, get, post
from litestar.handlers import HTTPRouteHandler
from msgspec import Meta

from reservation.domain.clock import as_wire
from reservation.sandbox.faults import FaultRequest
from reservation.sandbox.refusals import Refusal
from reservation.sandbox.requests import AnyRequest, read_body
from reservation.sandbox.state import Sandbox
from reservation.sandbox.state_records import Entry, Method, PaymentRecord

__all__ = ["control_routes"]

#: Maximum step of the clock: past every limit that the PG has.
_ADVANCE_SECONDS_MAX = 400 * 24 * 3600


class PaymentOrder(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """An authenticated payment, as if a buyer had been through the payment page."""

    order_id: str
    amount: int
    method: Method = "card"
    #: The code of the coming refusal of its confirm.
    decline: Annotated[str, Meta(pattern="^[A-Z][A-Z0-9_]{0,99}$")] | None = None
    customer_key: str | None = None
    order_name: Annotated[str, Meta(max_length=100)] = "sandbox"


class DepositOrder(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """Pay into a virtual account, reverse that deposit, or end a refund of it."""

    payment_key: str
    reverse: bool = False
    #: The result of the bank's transfer of a refund.
    refund: Literal["COMPLETED", "FAILED"] | None = None


class ClockOrder(
    msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """Advance the clock."""

    advance_seconds: Annotated[float, Meta(ge=0, le=_ADVANCE_SECONDS_MAX)]


class ClearOrder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`{"clear": true}`: all faults end."""

    clear: bool


_decode_payment = msgspec.json.Decoder(PaymentOrder).decode
_decode_deposit = msgspec.json.Decoder(DepositOrder).decode
_decode_clock = msgspec.json.Decoder(ClockOrder).decode

View = dict[str, object]


def control_routes(sandbox: Sandbox) -> list[HTTPRouteHandler]:
    """The endpoints whose paths begin with an underscore, which no PG has."""
    return [*_money_routes(sandbox), *_fault_routes(sandbox), *_clock_routes(sandbox)]


def _money_routes(sandbox: Sandbox) -> list[HTTPRouteHandler]:
    @post("/_payments", status_code=201)
    async def put_payment(request: AnyRequest) -> View:
        data = await read_body(request, _decode_payment)
        ledger = sandbox.ledger
        opened = ledger.open(
            order_id=data.order_id,
            order_name=data.order_name,
            amount=data.amount,
            customer_key=data.customer_key,
        )
        outcome = ledger.authenticate(opened.payment, method=data.method, decline=data.decline)
        ledger.commit(outcome)
        return {"paymentKey": outcome.payment.payment_key, "status": outcome.payment.status}

    @post("/_deposits", status_code=200)
    async def deposit(request: AnyRequest) -> View:
        data = await read_body(request, _decode_deposit)
        ledger = sandbox.ledger
        if data.refund is not None:
            outcome = ledger.end_refund(data.payment_key, data.refund)
        else:
            act = ledger.reverse_deposit if data.reverse else ledger.deposit
            outcome = act(data.payment_key)
        ledger.commit(outcome)
        return {"paymentKey": data.payment_key, "status": outcome.payment.status}

    @get("/_ledger", sync_to_thread=False)
    def ledger_view(request: AnyRequest) -> View:
        return _ledger_view(sandbox, request.query_params.get("orderId"))

    return [put_payment, deposit, ledger_view]


def _fault_routes(sandbox: Sandbox) -> list[HTTPRouteHandler]:
    def view() -> View:
        faults = sandbox.faults
        return {"faults": [rule.view() for rule in faults], "applied": faults.applied()}

    @post("/_faults", status_code=200)
    async def order_fault(request: AnyRequest) -> View:
        order = await read_body(request, _read_fault_order)
        if order is None:
            sandbox.faults.clear()
            return view()
        rule = sandbox.faults.add(order)
        if rule is None:
            raise Refusal("INVALID_REQUEST", "too many faults: clear some")
        return rule.view()

    @get("/_faults", sync_to_thread=False)
    def list_faults() -> View:
        return view()

    @delete("/_faults", status_code=200, sync_to_thread=False)
    def clear_faults() -> View:
        sandbox.faults.clear()
        return view()

    return [order_fault, list_faults, clear_faults]


def _clock_routes(sandbox: Sandbox) -> list[HTTPRouteHandler]:
    def view() -> View:
        clock = sandbox.clock
        return {"now": as_wire(clock.now_ms()), "offsetSeconds": clock.offset_ms / 1000}

    @post("/_clock", status_code=200)
    async def turn_clock(request: AnyRequest) -> View:
        data = await read_body(request, _decode_clock)
        sandbox.turn_clock(round(data.advance_seconds * 1000))
        return view()

    @get("/_clock", sync_to_thread=False)
    def show_clock() -> View:
        return view()

    @get("/_webhooks", sync_to_thread=False)
    def webhooks() -> View:
        return dict(sandbox.webhooks.counts)

    @get("/_health", sync_to_thread=False)
    def health() -> View:
        entries = len(sandbox.ledger.entries)
        return {"status": "ok", "entries": entries, **view()}

    return [turn_clock, show_clock, webhooks, health]


def _read_fault_order(body: bytes) -> FaultRequest | None:
    """A fault to set, or None to clear all."""
    try:
        clear = msgspec.json.decode(body, type=ClearOrder).clear
    except msgspec.ValidationError:
        return msgspec.json.decode(body, type=FaultRequest)
    if not clear:
        raise msgspec.ValidationError("name a fault, or clear: true")
    return None


def _ledger_view(sandbox: Sandbox, order_id: str | None) -> View:
    """All money, or one order's, with its sums."""
    ledger = sandbox.ledger
    ledger.lapse_due()
    entries = [entry for entry in ledger.entries if order_id is None or entry.order_id == order_id]
    sums = {"charge": 0, "deposit": 0, "deposit_reversed": 0, "cancel": 0}
    for entry in entries:
        sums[entry.kind] += entry.amount
    return {
        "payments": [_payment_view(record) for record in ledger.payments(order_id)],
        "entries": [_entry_view(entry) for entry in entries],
        "charged": sums["charge"] + sums["deposit"] - sums["deposit_reversed"],
        "cancelled": sums["cancel"],
    }


def _entry_view(entry: Entry) -> View:
    return {
        "seq": entry.seq,
        "at": as_wire(entry.at_ms),
        "kind": entry.kind,
        "paymentKey": entry.payment_key,
        "orderId": entry.order_id,
        "amount": entry.amount,
    }


def _payment_view(record: PaymentRecord) -> View:
    return {
        "paymentKey": record.payment_key,
        "orderId": record.order_id,
        "status": record.status,
        "method": record.method,
        "totalAmount": record.total_amount,
        "balanceAmount": record.balance_amount,
        "currency": record.currency,
    }
