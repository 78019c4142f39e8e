"""Rules of one sale: the required answer of each script, and its changes.

`shop` folds the events that happened; the rules predict them. The two share no state, so each
checks the other.
"""

import itertools
from typing import Any, Final

from reservation.domain.states import TRANSITIONS, Status
from reservation.verification.model.event_data import counter_of
from reservation.verification.model.sale_state import Item

__all__ = ["OUTCOMES", "Case", "Rules"]

#: The target status of each outcome; `voided` is computed.
OUTCOMES: Final[dict[str, dict[str, str]]] = {
    "confirmed": {"CONFIRMING": "CONFIRMED", "AWAITING_DEPOSIT": "CONFIRMED"},
    "awaiting_deposit": {"CONFIRMING": "AWAITING_DEPOSIT", "CONFIRMED": "AWAITING_DEPOSIT"},
    "declined": {"CONFIRMING": "RELEASED", "AWAITING_DEPOSIT": "RELEASED"},
    "voided": {"CONFIRMING": "HELD"},
    "expired": {"AWAITING_DEPOSIT": "EXPIRED", "CONFIRMING": "EXPIRED"},
    "refunded": dict.fromkeys(
        ("CONFIRMING", "AWAITING_DEPOSIT", "RELEASED", "EXPIRED"), "REFUNDED"
    ),
}


class Case:
    """One order, with the payments that the scripts remember."""

    def __init__(self, basket: dict[str, Any], status: str) -> None:
        self.id, self.buyer = str(basket["order"]), str(basket["buyer"])
        self.digest, self.lines = str(basket["digest"]), dict[str, int](basket["lines"])
        self.status = status
        self.fence = self.attempts = 0
        self.key = self.claim_id = self.finished = ""
        self.outcomes: dict[str, str] = {}
        #: Whether its deadline has passed, and whether the lease on its payment has.
        self.past = self.lease_over = self.paused = False


class Rules:
    """The rules of one sale.

    Each call's `behind` marks a caller whose clock is far behind: by it nothing has expired.

    Args:
        policy: when the sale takes its stock.
        items: its items, which this changes.
        attempts_max: payments that an order may try.
        total_max: units that an item may have.
        unpaid_max: orders of one buyer that may end unpaid; 0 means no limit.
    """

    def __init__(
        self,
        policy: str,
        items: dict[str, Item],
        *,
        attempts_max: int,
        total_max: int,
        unpaid_max: int = 0,
    ) -> None:
        self.policy, self.items = policy, items
        self.attempts_max, self.total_max, self.unpaid_max = attempts_max, total_max, unpaid_max
        self.orders: dict[str, Case] = {}
        self.operations: dict[str, str] = {}
        self.status, self.version, self.seq = "open", 1, 1

    def due(self, *, behind: bool) -> list[str]:
        """The orders whose hold has expired."""
        waiting = ("HELD", "PREPARED")
        found = [one.id for one in self.orders.values() if one.past and one.status in waiting]
        return [] if behind else found

    def helpful(
        self, buyer: str, lines: dict[str, int], refusal: list[Any], *, behind: bool, claims: bool
    ) -> list[str]:
        """The expired holds whose release may lift this refusal.

        Args:
            buyer: the one refused.
            lines: the basket.
            refusal: the reason.
            behind: as everywhere here.
            claims: a claim does not distinguish the buyer's own orders from others'.
        """
        due = self.due(behind=behind) if self.policy == "prepare" else []
        if refusal[0] == "limit_exceeded":
            sku = refusal[1]
            if lines[sku] > self.items[sku].limit:
                return []
            return due if claims else [one for one in due if self.orders[one].buyer == buyer]
        items = self.items
        gone = any(items[sku].available + items[sku].held < n for sku, n in lines.items())
        return [] if gone else due

    def bought(self, buyer: str, sku: str) -> int:
        """The count against the buyer's limit: all units held or sold under their orders."""
        return sum(
            order.lines.get(sku, 0)
            for order in self.orders.values()
            if order.buyer == buyer and counter_of(order.status) != "available"
        )

    def paid(self, buyer: str) -> int:
        """How many of the buyer's orders are paid, refunded ones included."""
        return sum(
            order.buyer == buyer and order.status in ("CONFIRMED", "REFUNDED")
            for order in self.orders.values()
        )

    def unpaid(self, buyer: str) -> int:
        """How many of the buyer's orders hold nothing and were not paid."""
        return sum(
            order.buyer == buyer and order.status in ("PREPARED", "RELEASED", "EXPIRED")
            for order in self.orders.values()
        )

    def move(self, order: Case, to: str) -> None:
        """Take an order along an edge, its units with it; one event."""
        if to not in TRANSITIONS[Status(order.status)] | {order.status}:
            raise ValueError(f"invalid transition from {order.status} to {to}")
        origin, target = counter_of(order.status), counter_of(to)
        for sku, quantity in order.lines.items():
            if origin != target:
                item = self.items[sku]
                item.move(quantity, origin, target)
        order.status = to
        self.seq += 1

    def shortage(self, buyer: str, lines: dict[str, int]) -> list[Any] | None:
        """The reason to refuse a basket: the buyer's limit, then the stock."""
        for sku, quantity in lines.items():
            taken, limit = self.bought(buyer, sku), self.items[sku].limit
            if taken + quantity > limit:
                return ["limit_exceeded", sku, str(limit), str(taken)]
        if any(self.items[sku].available < quantity for sku, quantity in lines.items()):
            left = [(sku, str(self.items[sku].available)) for sku in lines]
            return ["sold_out", *itertools.chain.from_iterable(left)]
        return None

    def prepare(self, baskets: list[dict[str, Any]], *, behind: bool) -> list[list[Any]]:
        """Decide a batch of baskets in order."""
        replies: list[list[Any]] = []
        for basket in baskets:
            waits = any(reply[0] == "due" for reply in replies)
            replies.append(["again"] if waits else self._decide(basket, behind=behind))
        return replies

    def _decide(self, basket: dict[str, Any], *, behind: bool) -> list[Any]:
        previous = self.orders.get(basket["order"])
        lines: dict[str, int] = basket["lines"]
        if previous and previous.digest == basket["digest"]:
            return ["replayed"]
        if 0 < self.unpaid_max <= self.unpaid(basket["buyer"]):
            return ["too_many_orders", str(self.unpaid_max)]
        unknown = [sku for sku in lines if sku not in self.items]
        if unknown:
            return ["sku_not_found", unknown[0]]
        if previous:
            return ["key_reused"]
        if self.status != "open":
            return [self.status]
        amount = sum(self.items[sku].price * quantity for sku, quantity in lines.items())
        if amount != basket["amount"]:
            return ["amount_mismatch", str(amount)]
        refusal = self.shortage(basket["buyer"], lines)
        if refusal:
            due = self.helpful(basket["buyer"], lines, refusal, behind=behind, claims=False)
            return ["due", sorted(due)] if due else refusal
        order = self.orders[basket["order"]] = Case(basket, "PREPARED")
        if self.policy == "prepare":
            self._take(order)
        self.seq += 1
        return ["held" if self.policy == "prepare" else "prepared"]

    def _take(self, order: Case) -> None:
        for sku, quantity in order.lines.items():
            self.items[sku].available -= quantity
            self.items[sku].held += quantity
        order.status = "HELD"

    def claim(self, order: Case, key: str, claim_id: str, *, over: bool, behind: bool) -> list[Any]:
        """A buyer is back from the PG with this payment key; `over`: the lease is over at once."""
        if order.status == "CONFIRMING" and (order.key, order.claim_id) == (key, claim_id):
            return ["claimed", str(order.fence)]
        if key in order.outcomes:
            return ["present", order.status, order.outcomes[key]]
        if order.status not in ("HELD", "PREPARED", "RELEASED", "EXPIRED"):
            return ["present", order.status, ""]
        if order.attempts >= self.attempts_max:
            return ["attempts_exhausted"]
        ended = order.status in ("RELEASED", "EXPIRED")
        gone = any(sku not in self.items for sku in order.lines)
        if gone or (ended and self.status != "open"):
            return ["expired"]
        if order.status != "HELD":
            refusal = self.shortage(order.buyer, order.lines)
            if refusal:
                due = self.helpful(order.buyer, order.lines, refusal, behind=behind, claims=True)
                if due:
                    return ["due", sorted(due)]
                return ["expired"] if ended and refusal[0] == "sold_out" else refusal
        self.move(order, "CONFIRMING")
        order.fence, order.attempts = order.fence + 1, order.attempts + 1
        order.key, order.claim_id, order.lease_over = key, claim_id, over
        order.paused = False
        return ["claimed", str(order.fence)]

    def lease(self, order: Case, fence: int, mode: str, claim_id: str, *, over: bool) -> list[Any]:
        """Take a payment over, or move or pause one's own lease."""
        confirming = order.status == "CONFIRMING"
        if confirming and order.claim_id == claim_id and order.fence == fence + 1:
            return ["taken", str(order.fence)]
        if not confirming or order.fence != fence:
            return ["stale", order.status, str(order.fence)]
        if mode in ("move", "pause"):
            order.lease_over, order.paused = over, mode == "pause"
            return ["moved"]
        if not order.lease_over and not (mode == "take_now" and order.paused):
            return ["leased"]
        order.fence, order.claim_id, order.lease_over = fence + 1, claim_id, over
        order.paused = False
        self.seq += 1
        return ["taken", str(order.fence)]

    def finish(
        self,
        order: Case,
        fence: int,
        outcome: str,
        attempt: str,
        *,
        behind: bool,
        restock: bool = True,
    ) -> list[Any]:
        """A payment ended; without `restock` the units that it gives up leave the sale."""
        to, finished = OUTCOMES[outcome].get(order.status), f"{outcome}:{fence}"
        if order.finished == finished and not to:
            return ["done", order.status]
        if order.fence != fence or not to:
            return ["stale", order.status, str(order.fence)]
        if outcome == "voided":
            to = "PREPARED" if self.policy == "success" else "HELD"
            to = "EXPIRED" if order.past and not behind else to
        gives_up = counter_of(order.status) == "held" and counter_of(to) == "available"
        self.move(order, to)
        if gives_up and not restock:
            self._withdraw(order)
        order.finished = finished
        if order.key and attempt:
            order.outcomes[order.key] = attempt
        elif order.key:
            order.outcomes.pop(order.key, None)
            order.key, order.claim_id, order.attempts = "", "", order.attempts - 1
        return ["done", to]

    def release(self, order: Case) -> list[Any]:
        """Give a hold back."""
        if order.status not in ("HELD", "PREPARED"):
            return ["present", order.status]
        self.move(order, "RELEASED")
        return ["released"]

    def expire(self, order: Case, *, behind: bool) -> str:
        """End a hold whose deadline has passed."""
        if order.status not in ("HELD", "PREPARED"):
            return "settled"
        if not order.past or behind:
            return "not_due"
        self.move(order, "EXPIRED")
        return "expired"

    def refund(self, order: Case, *, restock: bool) -> list[Any]:
        """Take a sold order back."""
        if order.status == "REFUNDED":
            return ["refunded"]
        if order.status != "CONFIRMED":
            return ["present", order.status]
        self.move(order, "REFUNDED")
        if not restock:
            self._withdraw(order)
        return ["refunded"]

    def _withdraw(self, order: Case) -> None:
        """Remove an order's available units from the sale."""
        for sku, quantity in order.lines.items():
            self.items[sku].available -= quantity
            self.items[sku].total -= quantity
        self.version += 1

    def restock(self, sku: str, delta: int, operation: str, digest: str) -> list[Any]:
        """Add units, or withdraw them."""
        previous = self.operations.get(operation)
        if previous:
            return ["done"] if previous == digest else ["key_reused"]
        item = self.items.get(sku)
        if item is None:
            return ["sku_not_found"]
        if item.available + delta < 0:
            return ["insufficient", str(item.available)]
        if item.total + delta > self.total_max:
            return ["too_many", str(item.total)]
        item.available, item.total = item.available + delta, item.total + delta
        self.operations[operation] = digest
        self.version += 1
        self.seq += 1
        return ["done"]

    def switch(self, status: str) -> list[Any]:
        """Pause, resume or close."""
        if self.status == status:
            return ["done"]
        if self.status == "closed":
            return ["closed"]
        self.status = status
        self.seq += 1
        return ["done"]

    def put(self, version: int, rows: dict[str, Item]) -> list[Any]:
        """Change the sale."""
        if version != self.version:
            return ["changed", str(self.version)]
        for sku, row in rows.items():
            previous = self.items.get(sku)
            in_use = previous.held + previous.sold if previous else 0
            if row.total < in_use:
                return ["total_too_low", sku, str(in_use)]
        for sku, item in self.items.items():
            if sku not in rows and item.held + item.sold:
                return ["item_in_use", sku]
        for sku, row in rows.items():
            if sku in self.items:
                row.held, row.sold = self.items[sku].held, self.items[sku].sold
                row.available = row.total - row.held - row.sold
        self.items = rows
        self.version += 1
        self.seq += 1
        return ["done", str(self.version)]
