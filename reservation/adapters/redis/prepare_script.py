"""The call of prepare.lua: its arguments for a batch of baskets, and the result of each."""

from collections.abc import Sequence
from typing import Any

import msgspec

from reservation.adapters.redis.errors import UnexpectedReply
from reservation.adapters.redis.keys import SaleKeys
from reservation.adapters.redis.mapping import as_items, as_mapping
from reservation.adapters.redis.script_results import (
    RETRY_AFTER_SECONDS,
    PrepareWord,
    dry,
    limit_exceeded,
    sold_out,
)
from reservation.domain.clock import as_wire
from reservation.domain.errors import (
    AmountMismatch,
    BuyerLimitExceeded,
    IdempotencyKeyReused,
    InvalidAdmission,
    OutcomeUnknown,
    RateLimited,
    ReservationError,
    SaleClosed,
    SaleNotOpen,
    SalePaused,
    SaleRecovering,
    SkuNotFound,
    SoldOut,
    TooManyOrders,
    Unavailable,
)
from reservation.domain.reservation import Basket, Line, Reservation, Wish
from reservation.domain.states import Status

__all__ = [
    "RETRY_AFTER_SECONDS",
    "BatchReply",
    "Decision",
    "HoldCreated",
    "Replayed",
    "Reply",
    "SharedFields",
    "encode",
    "outcome_of_lost_reply",
    "refusal_of",
    "shared_fields",
    "wish_args",
]


def encode(
    names: SaleKeys,
    head: Sequence[str | int | float],
    baskets: Sequence[Basket],
    wishes: Sequence[Wish],
    *,
    in_turn: bool,
    waited: Sequence[int],
    buckets: bool = False,
) -> tuple[list[str], list[str | int]]:
    """The keys and the arguments of the call.

    Args:
        names: the sale's key names.
        head: the first arguments, up to the buyers' limits.
        baskets: baskets of one sale, in the order of their decision.
        wishes: their distinct requests (lines and prices).
        in_turn: whether the baskets behind one that waits for overdue holds wait with it.
        waited: the positions, from 1, of the baskets that no overdue hold can help.
        buckets: whether the sale has tombstones, so that each basket's bucket is read.
    """
    indices: dict[str, int] = {}
    asked_for: list[str | int] = []
    for wish in wishes:
        asked_for += wish_args(wish, indices)
    numbers = {wish: str(number) for number, wish in enumerate(wishes, 1)}
    keys = [*names.of_prepare, *map(names.stock, indices)]
    asked: list[str] = []
    for basket in baskets:
        keys += names.of_basket(basket.order_id, basket.buyer_id)
        if buckets:
            keys.append(names.ended(basket.buyer_id))
        asked.append(numbers[basket.wish])
    counts = (len(indices), len(wishes), len(baskets))
    turns = (int(in_turn), " ".join(map(str, waited)))
    return keys, [*map(str, head), *counts, " ".join(asked), *turns, *indices, *asked_for]


def wish_args(wish: Wish, indices: dict[str, int]) -> tuple[str | int, ...]:
    """The arguments of a wish; `indices` numbers the stock keys from 1, and gets the new ones."""
    lines = [
        f"{indices.setdefault(line.sku, len(indices) + 1)} {line.quantity}" for line in wish.lines
    ]
    return (
        wish.digest,
        wish.order_name,
        msgspec.json.encode(wish.order_name).decode(),
        wish.amount,
        int(wish.admitted),
        " ".join(lines),
    )


class Replayed(msgspec.Struct, frozen=True):
    """A replay: the order exists already, made from the same body."""


class SharedFields(msgspec.Struct, frozen=True, eq=False):
    """Fields shared by the reservations that one call made of one wish; compared by identity."""

    #: One of them as a template; its ids and number are empty.
    reservation: Reservation


class HoldCreated(msgspec.Struct, frozen=True):
    """A reservation that this call made."""

    shared: SharedFields
    basket: Basket
    #: The seq of its event.
    seq: int

    def reservation(self) -> Reservation:
        """The reservation, from the shared fields and its own."""
        return msgspec.structs.replace(
            self.shared.reservation,
            order_id=self.basket.order_id,
            buyer_id=self.basket.buyer_id,
            seq=self.seq,
        )


Decision = HoldCreated | Replayed

#: prepare.lua's reply to one basket: its event's seq, a repeated refusal, a word, or an error.
Reply = int | list[str] | Exception


class BatchReply:
    """prepare.lua's reply to a whole batch, which decodes the replies to its baskets."""

    def __init__(
        self, sale_id: str, word: PrepareWord, facts: Sequence[Any], wishes: Sequence[Wish]
    ) -> None:
        self._shared: dict[Wish, SharedFields] = {}
        self._refusals: dict[tuple[str, ...], ReservationError] = {}
        #: Refusals for want of stock, in the order of the replies, which refer to them by number.
        self._short: list[ReservationError] = []
        #: The refusal of the whole batch; None if each basket has its own reply.
        self.refusal: ReservationError | None = None
        #: False if too few replicas have the batch and the changes that its refusals report.
        self.is_acknowledged = True
        #: The number and the chain value of the sale's last event; empty if nothing was written.
        self.mark: Sequence[str] = ()
        if word is not PrepareWord.HELD and word is not PrepareWord.PREPARED:
            self.refusal = refusal_of(word, facts)
            return
        expires_at, created_at, self.mark, *items = facts
        status = Status.HELD if word is PrepareWord.HELD else Status.PREPARED
        for wish, text in zip(wishes, items, strict=True):
            # No text: the sale lacks an item of the wish, so no basket of it is held.
            if text:
                self._shared[wish] = shared_fields(
                    sale_id, status, wish, as_items(text), int(expires_at), int(created_at)
                )

    def decision_of(self, basket: Basket, reply: Reply) -> Decision | ReservationError:
        """The decision in a basket's own reply; call it for the replies in their order.

        Raises:
            UnexpectedReply: the basket's data is damaged, and the script did not change it.
        """
        decision = self._decision_of(basket, reply)
        if self.is_acknowledged or isinstance(decision, Replayed):
            return decision
        if isinstance(decision, HoldCreated):
            return OutcomeUnknown(retryAfter=RETRY_AFTER_SECONDS)
        return Unavailable(retryAfter=RETRY_AFTER_SECONDS)

    def _decision_of(self, basket: Basket, reply: Reply) -> Decision | ReservationError:
        if isinstance(reply, int):
            if reply < 0:
                return self._short[-reply - 1]
            return HoldCreated(self._shared[basket.wish], basket, reply)
        if isinstance(reply, Exception):
            raise UnexpectedReply(str(reply)) from reply
        reply_key = tuple(reply)
        # Most refusals of one call are equal: one object serves all of them.
        refusal = self._refusals.get(reply_key)
        if refusal is not None:
            return refusal
        word, *facts = reply_key
        if word == PrepareWord.REPLAYED:
            return Replayed()
        refusal = refusal_of(PrepareWord(word), facts)
        if isinstance(refusal, SoldOut) or word == PrepareWord.DRY:
            self._short.append(refusal)
        # Not shared: this refusal lists the buyer's own orders.
        elif not isinstance(refusal, BuyerLimitExceeded):
            self._refusals[reply_key] = refusal
        return refusal


def shared_fields(
    sale_id: str,
    status: Status,
    wish: Wish,
    lines: tuple[Line, ...],
    expires_at_ms: int,
    created_at_ms: int,
) -> SharedFields:
    """The fields of the holds of one wish; `lines` are its lines at the prices of the sale."""
    return SharedFields(
        Reservation(
            order_id="",
            sale_id=sale_id,
            buyer_id="",
            status=status,
            lines=lines,
            amount=wish.amount,
            currency=wish.currency,
            order_name=wish.order_name,
            created_at_ms=created_at_ms,
            updated_at_ms=created_at_ms,
            expires_at_ms=expires_at_ms,
            seq=0,
            digest=wish.digest,
        )
    )


def refusal_of(word: PrepareWord, facts: Sequence[str]) -> ReservationError:
    """A refused basket's error, by the script's word and its facts."""
    match word:
        case PrepareWord.SOLD_OUT:
            return sold_out(facts)
        case PrepareWord.LIMIT_EXCEEDED:
            return limit_exceeded(facts)
        case PrepareWord.AMOUNT_MISMATCH:
            return AmountMismatch(expectedAmount=int(facts[0]))
        case PrepareWord.SKU_NOT_FOUND:
            return SkuNotFound(sku=facts[0])
        case PrepareWord.KEY_REUSED:
            return IdempotencyKeyReused()
        case PrepareWord.NOT_ADMITTED:
            return InvalidAdmission()
        case PrepareWord.TOO_MANY_ORDERS:
            return TooManyOrders(limit=int(facts[0]))
        case PrepareWord.RATE_LIMITED:
            return RateLimited(retryAfter=max(1, -(-int(facts[0]) // 1000)))
        case PrepareWord.CLOSED:
            return SaleClosed()
        case PrepareWord.NOT_OPEN:
            return SaleNotOpen(opensAt=as_wire(int(facts[0])))
        case PrepareWord.PAUSED:
            return SalePaused(retryAfter=RETRY_AFTER_SECONDS)
        case PrepareWord.RECOVERING | PrepareWord.WENT_BACK:
            return SaleRecovering(retryAfter=RETRY_AFTER_SECONDS)
        # Other partitions may have the units, so it must not be `sold_out`.
        case PrepareWord.DRY:
            return dry(facts)
        case PrepareWord.TOO_LATE:
            return Unavailable(retryAfter=RETRY_AFTER_SECONDS)
        case _:
            raise AssertionError(word)


def outcome_of_lost_reply(digest: str, flat: Any) -> Replayed | ReservationError:
    """Decides a basket whose reply was lost from its order's hash, if any.

    Either the lost call or an earlier one under the same key took the hold; nothing distinguishes
    the two. So the outcome is a replay in its present state, and never a second new order.
    """
    fields = as_mapping(flat)
    if not fields:
        return Unavailable(retryAfter=RETRY_AFTER_SECONDS)
    if fields["digest"] != digest:
        return IdempotencyKeyReused()
    return Replayed()
