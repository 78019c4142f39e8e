"""Response checks: whether an answer was possible in the sale's state at one moment.

A call has a window of moments, from the head that was known before it to the one that was seen
after it. Its answer must be possible in at least one of them.
"""

from typing import Final

from reservation.domain.reservation import PAYMENT_ATTEMPTS_MAX
from reservation.verification.model.history_format import Operation
from reservation.verification.model.sale_state import Order, SaleState

__all__ = [
    "CLOCKS_APART_MS",
    "is_accepted",
    "is_refusal",
    "is_uninformative",
    "objection",
    "status_mismatch",
    "waits_for",
]

#: How far the clocks of two machines may be apart before the service itself raises an alarm.
CLOCKS_APART_MS: Final = 2_000

#: Answers that are not evidence about the sale: bad credentials or requests, rate limits, unknown
#: outcomes.
_UNINFORMATIVE: Final = frozenset(
    {
        "forbidden",
        "hold_lost",
        "idempotency_key_reused",
        "invalid_admission",
        "invalid_token",
        "malformed_request",
        "outcome_unknown",
        "rate_limited",
        "reservation_not_found",
        "sale_not_found",
        "sale_recovering",
        "unauthenticated",
        "unavailable",
    }
)
_DECLINED: Final = frozenset({"declined", "voided"})
#: No payment of an order in one of these is in progress, and the next one may begin.
_NOT_BEGUN: Final = frozenset({"HELD", "PREPARED", "RELEASED", "EXPIRED"})


def is_uninformative(operation: Operation) -> bool:
    """Whether the answer is not evidence about the sale."""
    if operation.code:
        return operation.code in _UNINFORMATIVE
    return not 200 <= operation.status < 300


def waits_for(state: SaleState, operation: Operation) -> set[str]:
    """The changes that may make possible an answer that is not possible now.

    An order's id, or `buyer:` or `sku:` with its value; the empty text is the sale itself.
    """
    keys = {"", operation.order}
    if not operation.code:
        return keys
    order = state.orders.get(operation.order)
    lines = order.lines if order else operation.lines
    keys.add(f"buyer:{order.buyer if order else operation.buyer}")
    keys.update(f"sku:{line[0]}" for line in lines)
    return keys


def is_refusal(operation: Operation) -> bool:
    """Whether the sale refused the call."""
    return bool(operation.code)


def objection(state: SaleState, operation: Operation, answered_ms: int) -> str:
    """Why the answer is not possible now; empty if it is.

    Args:
        state: the sale at one moment of the call.
        operation: the call and its answer.
        answered_ms: when the answer came, Unix milliseconds.
    """
    if operation.operation == "prepare" and operation.code:
        return _prepare_refusal(state, operation, answered_ms)
    order = state.orders.get(operation.order)
    if order is None:
        return f"{operation.order} does not exist"
    if not operation.code:
        if is_accepted(operation) and _may_begin(order, operation.payment_key):
            return ""
        return status_mismatch(order, operation.reported, answered_ms)
    return _order_refusal(state, order, operation, answered_ms)


def is_accepted(operation: Operation) -> bool:
    """Whether the answer accepts a payment without its outcome.

    After ten seconds the answer is 202: the payment continues, its outcome is unknown. The 202 does
    not state the order's status.
    """
    accepted = operation.operation == "success" and operation.status == 202
    return accepted and operation.reported == "CONFIRMING" and operation.payment_key != ""


def _may_begin(order: Order, payment_key: str) -> bool:
    """Whether the payment's claim may still come: Redis may be too slow for it until its 202.

    A finished payment was claimed, so its 202 would be wrong.
    """
    return order.status in _NOT_BEGUN and payment_key not in (order.ends or {})


def status_mismatch(order: Order, reported: str, answered_ms: int) -> str:
    """Why the order's state in the answer is wrong; empty if it is right."""
    if order.status == reported:
        return ""
    over = order.expires_at <= answered_ms + CLOCKS_APART_MS
    if reported == "EXPIRED" and over and order.status in ("HELD", "PREPARED"):
        # Expired for the buyer as soon as the deadline is past, reaped or not.
        return ""
    return f"reported as {reported}, it is {order.status}"


def _prepare_refusal(state: SaleState, operation: Operation, answered_ms: int) -> str:
    match operation.code:
        case "sold_out":
            return _not_sold_out(state, operation)
        case "buyer_limit_exceeded":
            return _not_at_limit(state, operation.buyer, operation)
        case "amount_mismatch":
            return _right_amount(state, operation)
        case "too_many_orders":
            unpaid = state.unpaid(operation.buyer)
            few = f"{unpaid} orders ended unpaid, the limit is {operation.limit}"
            return "" if unpaid >= operation.limit > 0 else few
        case "sku_not_found":
            known = all(sku in state.items for sku, _ in operation.lines)
            return "every item is on sale" if known else ""
        case "sale_paused":
            return "" if state.status == "paused" else f"the sale is {state.status}"
        case "sale_closed":
            over = state.status == "closed" or state.closes_at <= answered_ms + CLOCKS_APART_MS
            return "" if over else "the sale has not ended"
        case "sale_not_open":
            early = answered_ms - CLOCKS_APART_MS < state.opens_at
            return "" if early else "the sale has opened"
        case code:
            return f"{operation.status} {code} is not a refusal of prepare"


def _not_sold_out(state: SaleState, operation: Operation) -> str:
    for sku, count in operation.available.items():
        item = state.items.get(sku)
        if item is None or item.available != count:
            left = 0 if item is None else item.available
            return f"{count} {sku} reported as available, {left} are"
    for sku, quantity in operation.lines:
        item = state.items.get(sku)
        if item is None or item.available < quantity:
            return ""
    return "every item is available"


def _not_at_limit(state: SaleState, buyer: str, operation: Operation) -> str:
    sku = operation.sku
    item = state.items.get(sku)
    if item is None:
        return f"{sku} is not on sale"
    taken, limit = state.taken[sku].get(buyer, 0), item.limit
    if (taken, limit) != (operation.taken, operation.limit):
        return f"reported {operation.taken} of {operation.limit} {sku}, expected {taken} of {limit}"
    wanted = sum(quantity for name, quantity in operation.lines if name == sku)
    return (
        ""
        if taken + wanted > limit
        else f"{taken} plus {wanted} {sku} are within the limit of {limit}"
    )


def _right_amount(state: SaleState, operation: Operation) -> str:
    prices = [(state.items.get(sku), quantity) for sku, quantity in operation.lines]
    amount = sum(item.price * quantity for item, quantity in prices if item is not None)
    if operation.expected_amount and amount != operation.expected_amount:
        return f"reported price {operation.expected_amount}, expected {amount}"
    return "" if amount != operation.amount else f"{amount} is the price"


def _order_refusal(state: SaleState, order: Order, operation: Operation, answered_ms: int) -> str:
    match operation.code:
        case "payment_declined":
            ended = (order.ends or {}).get(operation.payment_key, "")
            return "" if ended in _DECLINED else f"the payment is {ended or 'not declined'}"
        case "amount_mismatch":
            same = operation.amount == order.amount
            return f"{order.amount} is its amount" if same else ""
        case "payment_in_progress":
            moving = order.status in ("CONFIRMING", "AWAITING_DEPOSIT")
            return "" if moving else f"it is {order.status}"
        case "already_confirmed":
            return "" if order.status == "CONFIRMED" else f"it is {order.status}"
        case "sold_out":
            return "" if _is_short(state, order) else "every item is available"
        case "buyer_limit_exceeded":
            return _not_at_limit(state, order.buyer, _with_lines(operation, order))
        case "reservation_expired":
            return _not_expired(state, order, operation, answered_ms)
        case "not_refundable":
            return "it is CONFIRMED" if order.status == "CONFIRMED" else ""
        case code:
            return f"{operation.status} {code} is not a refusal of {operation.operation}"


def _with_lines(operation: Operation, order: Order) -> Operation:
    lines = [(sku, quantity) for sku, quantity, _ in order.lines]
    return Operation(
        sale=operation.sale,
        client=operation.client,
        operation=operation.operation,
        invoked_ns=operation.invoked_ns,
        lines=lines,
        sku=operation.sku,
        limit=operation.limit,
        taken=operation.taken,
    )


def _is_short(state: SaleState, order: Order) -> bool:
    found = [(state.items.get(sku), quantity) for sku, quantity, _ in order.lines]
    return any(item is None or item.available < quantity for item, quantity in found)


def _not_expired(state: SaleState, order: Order, operation: Operation, answered_ms: int) -> str:
    """A payment that came too late, for an order that could not be reacquired either."""
    if (order.ends or {}).get(operation.payment_key) == "expired":
        return ""
    if order.status not in ("RELEASED", "EXPIRED"):
        return f"it is {order.status}"
    over = answered_ms + CLOCKS_APART_MS >= state.closes_at
    tries = len(order.ends or {})
    if state.status != "open" or over or _is_short(state, order) or tries >= PAYMENT_ATTEMPTS_MAX:
        return ""
    return f"it is {order.status} and its items are available"
