"""Reservations in Redis: one method per script, and the reads.

Refusals are raised as `ReservationError`, expected outcomes are values. A change
whose reply was lost is repeated. The prepare queue (`reservation.adapters.redis.prepare_queue`)
looks the orders up instead.
"""

import itertools
import secrets
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.errors import NotAcknowledged, unwrap
from reservation.adapters.redis.expiry import Expiry
from reservation.adapters.redis.keys import Keys, is_lane, order_field
from reservation.adapters.redis.mapping import as_mapping, as_reservation
from reservation.adapters.redis.script_results import (
    RETRY_AFTER_SECONDS,
    ClaimWord,
    FinishWord,
    LeaseWord,
    claim_answer,
)
from reservation.adapters.redis.script_runner import ScriptRunner, members_json
from reservation.adapters.redis.tombstones import digest_in
from reservation.domain.clock import Clock
from reservation.domain.errors import ReservationExpired, SaleRecovering, Unavailable
from reservation.domain.ids import sale_of
from reservation.domain.payment import (
    Claimed,
    ClaimLost,
    Finished,
    LeaseElsewhere,
    Outcome,
    Present,
    Reason,
)
from reservation.domain.reservation import PAYMENT_ATTEMPTS_MAX, Reservation
from reservation.domain.states import Status

__all__ = [
    "ReservationStore",
]

#: Rounds of expiring due holds and retrying, per claim.
DUE_ROUNDS_MAX: Final = 50
#: Orders of one buyer searched for live ones, and the batch size.
BUYER_ORDERS_MAX: Final = 100_000
ORDERS_AT_ONCE: Final = 1_000


class ReservationStore:
    """Reads and changes reservations."""

    def __init__(self, connections: RedisClient, keys: Keys, *, clock: Clock) -> None:
        self._connections = connections
        self._calls = ScriptRunner(connections)
        #: Expires due holds; prepare's queue uses it as well.
        self.expiry = Expiry(connections, self._calls, keys, clock=clock)
        self._keys = keys
        self._clock = clock

    async def read(self, order_id: str) -> Reservation | None:
        """The reservation of this id, or None if Redis has none."""
        found = await self.read_many([order_id])
        return found[0]

    async def read_in_redis(self, order_id: str) -> Reservation | None:
        """The reservation, if Redis itself has it; SQL is not read."""
        return (await ReservationStore.read_many(self, [order_id]))[0]

    async def read_acknowledged(self, order_id: str) -> Reservation | None:
        """Like `read`; enough replicas have the state that it returns.

        Raises:
            NotAcknowledged: too few replicas have it.
        """
        (found,) = await self.read_many_acknowledged([order_id])
        return found

    async def read_many_acknowledged(self, order_ids: Sequence[str]) -> list[Reservation | None]:
        """Like `read_acknowledged`, for orders of one sale."""
        sale_id = sale_of(order_ids[0]) or ""
        names = self._keys.of(sale_id)
        currency, *orders = await self._connections.acked_read(
            [
                ("HGET", names.sale, "currency"),
                *(("HGETALL", names.order(order_id)) for order_id in order_ids),
            ],
            touched=names.sale,
        )
        return [
            _reservation(sale_id, order_id, unwrap(currency), as_mapping(unwrap(fields)))
            for order_id, fields in zip(order_ids, orders, strict=True)
        ]

    @property
    def requires_acks(self) -> bool:
        """Whether replicas must acknowledge changes."""
        return self._connections.acks.wanted > 0

    def require_acks(self, sale_id: str) -> None:
        """Refuse a new payment attempt while too few replicas acknowledge changes.

        Raises:
            TooFewReplicas: the claim must not be sent.
        """
        self._connections.require_acks(self._keys.of(sale_id).sale)

    async def digest(self, order_id: str, buyer_id: str) -> str | None:
        """The digest of the body that made this buyer's order, or None if Redis has none."""
        # Many prepares at overload ask for it, so a tombstone's costs no query.
        names = self._keys.of(sale_of(order_id) or "")
        digest, text = await self._connections.pipeline(
            [
                ("HGET", names.order(order_id), "digest"),
                ("HGET", names.ended(buyer_id), order_field(order_id)),
            ]
        )
        return unwrap(digest) or digest_in(unwrap(text) or "")

    async def read_many(self, order_ids: Sequence[str]) -> list[Reservation | None]:
        """The reservations of these ids, in order, each None if Redis has none.

        Raises:
            SaleRecovering: Redis has an order but no longer its sale, which has the currency.
        """
        if not order_ids:
            return []
        of_order = {order_id: sale_of(order_id) or "" for order_id in order_ids}
        sales = list(dict.fromkeys(of_order.values()))
        replies = await self._connections.pipeline(
            [
                *(("HGET", self._keys.of(sale_id).sale, "currency") for sale_id in sales),
                *(("HGETALL", self._keys.of(of_order[one]).order(one)) for one in order_ids),
            ]
        )
        currencies = dict(zip(sales, map(unwrap, replies), strict=False))
        found: list[Reservation | None] = []
        for order_id, reply in zip(order_ids, replies[len(sales) :], strict=True):
            sale_id, fields = of_order[order_id], as_mapping(unwrap(reply))
            found.append(_reservation(sale_id, order_id, currencies[sale_id], fields))
        return found

    async def orders_of_buyer(self, sale_id: str, buyer_id: str, limit: int) -> list[Reservation]:
        """This buyer's reservations in this sale, newest first, at most `limit`."""
        order_ids = await self._connections.command(
            "ZREVRANGE", self._keys.of(sale_id).buyer_orders(buyer_id), 0, limit - 1
        )
        return [found for found in await self.read_many(order_ids) if found is not None]

    async def live_orders_of_buyer(self, sale_id: str, buyer_id: str, limit: int) -> list[str]:
        """The buyer's live orders, newest first, at most `limit`.

        Ended orders in between do not count: a forgotten hold is found behind any number of them.

        Raises:
            StoreUnavailable, StoreUncertain: Redis does not reply.
        """
        names = self._keys.of(sale_id)
        sets = (names.deadlines, names.confirming, names.deposits)
        live: list[str] = []
        for first in range(0, BUYER_ORDERS_MAX, ORDERS_AT_ONCE):
            last = first + ORDERS_AT_ONCE - 1
            order_ids = await self._connections.command(
                "ZREVRANGE", names.buyer_orders(buyer_id), first, last
            )
            if not order_ids:
                break
            scores = await self._connections.pipeline(
                [("ZMSCORE", key, *order_ids) for key in sets]
            )
            found = zip(*map(unwrap, scores), strict=True)
            live += [
                order_id
                for order_id, places in zip(order_ids, found, strict=True)
                if any(score is not None for score in places)
            ]
            if len(live) >= limit or len(order_ids) < ORDERS_AT_ONCE:
                break
        return live[:limit]

    async def due(self, sale_id: str, limit: int) -> list[str]:
        """Orders whose deadline has passed by both clocks, oldest first."""
        now_ms = min(self._connections.server_now_ms(sale_id), self._clock.now_ms())
        return await self._until(self._keys.of(sale_id).deadlines, now_ms, limit)

    async def is_leased(self, order: Reservation) -> bool:
        """Whether another caller's lease on the order's payment has time left."""
        key = self._keys.of(order.sale_id).confirming
        ends_at_ms = await self._connections.command("ZSCORE", key, order.order_id)
        return ends_at_ms is not None and float(ends_at_ms) > self._connections.server_now_ms(key)

    async def leases_over(self, sale_id: str, limit: int) -> list[str]:
        """Orders in CONFIRMING whose lease has expired, the longest expired first."""
        now_ms = self._connections.server_now_ms(sale_id)
        return await self._until(self._keys.of(sale_id).confirming, now_ms, limit)

    async def deposits_over(self, sale_id: str, limit: int) -> list[str]:
        """Orders awaiting a deposit whose account's due date has passed."""
        now_ms = self._connections.server_now_ms(sale_id)
        return await self._until(self._keys.of(sale_id).deposits, now_ms, limit)

    async def _until(self, key: str, score: int, limit: int) -> list[str]:
        return await self._connections.command(
            "ZRANGEBYSCORE", key, "-inf", score, "LIMIT", 0, limit
        )

    async def first_deadlines(self, sale_id: str, limit: int) -> dict[str, int]:
        """Orders and their deadlines, the nearest first."""
        return await self._first(self._keys.of(sale_id).deadlines, limit)

    async def first_leases(self, sale_id: str, limit: int) -> dict[str, int]:
        """Orders in CONFIRMING and the end of their lease, the nearest first."""
        return await self._first(self._keys.of(sale_id).confirming, limit)

    async def _first(self, key: str, limit: int) -> dict[str, int]:
        flat = await self._connections.command("ZRANGE", key, 0, limit - 1, "WITHSCORES")
        return {flat[i]: int(float(flat[i + 1])) for i in range(0, len(flat), 2)}

    async def lease_end(self, order: Reservation) -> int | None:
        """When the lease on an order's confirm ends; None if it is not CONFIRMING."""
        key = self._keys.of(order.sale_id).confirming
        score = await self._connections.command("ZSCORE", key, order.order_id)
        return int(float(score)) if score is not None else None

    async def undecided(self, sale_id: str) -> int:
        """How many orders are in CONFIRMING."""
        return int(await self._connections.command("ZCARD", self._keys.of(sale_id).confirming))

    async def claim(
        self,
        order: Reservation,
        *,
        epoch: str,
        payment_key: str,
        lease_ms: int,
        known_fence: int = 0,
        is_requested: bool = False,
    ) -> Claimed | Present:
        """Take a reservation to CONFIRMING for one payment attempt (claim.lua).

        Args:
            order: the reservation.
            epoch: of its sale.
            payment_key: of the attempt.
            lease_ms: how long only this caller may ask for the money.
            known_fence: the highest that SQL has for the order; no fence is given twice.
            is_requested: whether its money may have moved: then all overdue holds that may help end
                before it is refused.

        Raises:
            SoldOut, BuyerLimitExceeded, ReservationExpired: no payment may be requested.
            PartitionDry: no payment may be requested until the partition has borrowed the units.
            HoldLost: Redis does not have the order.
            and the errors of `ScriptRunner.run`.
        """
        keys = self._keys.of(order.sale_id)
        claim_id = secrets.token_hex(8)
        for _ in itertools.count() if is_requested else range(DUE_ROUNDS_MAX):
            acknowledged = True
            try:
                reply = await self._run(
                    "claim",
                    order,
                    epoch=epoch,
                    of_sale=[keys.sale, keys.deadlines, keys.confirming, keys.outbox],
                    args=[
                        self._clock.now_ms(),
                        order.order_id,
                        payment_key,
                        claim_id,
                        lease_ms,
                        PAYMENT_ATTEMPTS_MAX,
                        known_fence,
                    ],
                )
            except NotAcknowledged as short:
                acknowledged, reply = False, short.reply
                # A refusal reports changes that a failover may lose.
                if reply[0] not in (ClaimWord.CLAIMED, ClaimWord.PRESENT, ClaimWord.DUE):
                    raise
            if reply[0] != ClaimWord.DUE:
                answer = claim_answer(ClaimWord(reply[0]), reply[1:], claim_id)
                if isinstance(answer, Claimed):
                    return msgspec.structs.replace(answer, is_acknowledged=acknowledged)
                return answer
            # Others may have expired the same ones, or a reply was lost: these count as settled.
            # Damaged holds can never be expired.
            ended = await self.expiry.end(order.sale_id, reply[1:], epoch=epoch)
            if not ended.freed_stock:
                break
        if is_lane(order.sale_id):
            # Other partitions may have the units.
            raise Unavailable(retryAfter=RETRY_AFTER_SECONDS)
        raise ReservationExpired

    async def take_over(
        self,
        order: Reservation,
        *,
        epoch: str,
        lease_ms: int,
        known_fence: int = 0,
        during_pause: bool = False,
    ) -> Claimed | LeaseElsewhere:
        """Take over a payment whose lease has expired, under a new fence (lease.lua, `take`).

        Args:
            order: the reservation.
            epoch: of its sale.
            lease_ms: the new lease.
            known_fence: the highest fence that SQL has for the order.
            during_pause: also before the end of a pause between two look-ups.

        Raises:
            TooFewReplicas: nothing was sent, since too few replicas acknowledge changes.
            NotAcknowledged: too few replicas have the new fence, so it must not be used.
            and the errors of `ScriptRunner.run`.
        """
        self.require_acks(order.sale_id)
        claim_id = secrets.token_hex(8)
        reply = await self._lease(
            order,
            epoch=epoch,
            lease_ms=lease_ms,
            mode="take_now" if during_pause else "take",
            claim_id=claim_id,
            known_fence=known_fence,
        )
        if reply[0] == LeaseWord.TAKEN:
            return Claimed(int(reply[1]), int(reply[2]), claim_id)
        return LeaseElsewhere()

    async def move_lease(
        self, order: Reservation, *, epoch: str, fence: int, lease_ms: int
    ) -> None:
        """End the caller's lease `lease_ms` from now; no effect on another caller's lease."""
        claimed = msgspec.structs.replace(order, fence=fence)
        await self._lease(claimed, epoch=epoch, lease_ms=lease_ms, mode="move")

    async def pause_lease(
        self, order: Reservation, *, epoch: str, fence: int, lease_ms: int
    ) -> None:
        """The same, if no call of the caller to the PG is in progress: `during_pause` ends it."""
        claimed = msgspec.structs.replace(order, fence=fence)
        await self._lease(claimed, epoch=epoch, lease_ms=lease_ms, mode="pause")

    async def _lease(
        self,
        order: Reservation,
        *,
        epoch: str,
        lease_ms: int,
        mode: str,
        claim_id: str = "",
        known_fence: int = 0,
    ) -> list[str]:
        keys = self._keys.of(order.sale_id)
        return await self._call(
            "lease",
            order,
            epoch=epoch,
            keys=[keys.sale, keys.confirming, keys.outbox, keys.order(order.order_id)],
            args=[order.order_id, order.fence, lease_ms, mode, claim_id, known_fence],
            # A lost move leaves the lease that the take-over or the claim had set.
            acked=mode in ("take", "take_now"),
        )

    async def finish(
        self,
        order: Reservation,
        *,
        epoch: str,
        fence: int,
        outcome: Outcome,
        payment_key: str = "",
        claim_id: str = "",
    ) -> Finished:
        """Record the outcome of a payment, under the fence of its request (finish.lua).

        Args:
            order: as read before the call to the PG. Without a lease, the script refuses to
                overwrite later changes.
            epoch: of its sale.
            fence: of the claim, which may be later than the order's own.
            outcome: from the PG's answer.
            payment_key: the payment of the call to the PG.
            claim_id: the claim that got the fence; empty if the caller read the fence.

        Raises:
            ClaimLost: Redis has not seen this claim: it has lost events.
            and the errors of `ScriptRunner.run`.
        """
        keys = self._keys.of(order.sale_id)
        reply = await self._run(
            "finish",
            order,
            epoch=epoch,
            of_sale=[keys.sale, keys.deadlines, keys.confirming, keys.deposits, keys.outbox],
            args=[
                self._clock.now_ms(),
                order.order_id,
                fence,
                outcome.name,
                outcome.attempt,
                outcome.due_ms,
                members_json(outcome.event_members),
                order.seq,
                payment_key,
                claim_id,
                int(outcome.restock),
            ],
        )
        if reply[0] == FinishWord.LOST:
            raise ClaimLost(f"fence {fence}, Redis has {reply[1]} under fence {reply[2]}")
        return Finished(Status(reply[1]), applied=reply[0] == FinishWord.DONE)

    async def release(self, order: Reservation, *, epoch: str, reason: Reason) -> Status:
        """Release a hold (release.lua); returns the resulting status."""
        keys = self._keys.of(order.sale_id)
        reply = await self._run(
            "release",
            order,
            epoch=epoch,
            of_sale=[keys.sale, keys.deadlines, keys.outbox],
            args=[order.order_id, members_json(reason.members())],
        )
        return Status(reply[1]) if len(reply) > 1 else Status.RELEASED

    async def expire(self, sale_id: str, order_ids: Sequence[str], *, epoch: str) -> int:
        """Expire those of the orders that are due; returns their number (see `Expiry`)."""
        return await self.expiry(sale_id, order_ids, epoch=epoch)

    async def refund(
        self, order: Reservation, *, epoch: str, restock: bool, reason: Reason
    ) -> Status:
        """Take a sold order to REFUNDED (refund.lua); returns the resulting status."""
        keys = self._keys.of(order.sale_id)
        reply = await self._run(
            "refund",
            order,
            epoch=epoch,
            of_sale=[keys.sale, keys.outbox],
            args=[order.order_id, int(restock), members_json(reason.members())],
        )
        return Status(reply[1]) if len(reply) > 1 else Status.REFUNDED

    async def _run(
        self,
        script: str,
        order: Reservation,
        *,
        epoch: str,
        of_sale: Sequence[str],
        args: Sequence[str | int],
    ) -> list[str]:
        """Run a script that takes keys of the sale, then the order, its buyer and its stocks."""
        keys = self._keys.of(order.sale_id)
        of_order = [
            keys.order(order.order_id),
            keys.buyer(order.buyer_id),
            *(keys.stock(line.sku) for line in order.lines),
        ]
        return await self._call(script, order, epoch=epoch, keys=[*of_sale, *of_order], args=args)

    async def _call(
        self,
        script: str,
        order: Reservation,
        *,
        epoch: str,
        keys: Sequence[str],
        args: Sequence[str | int],
        acked: bool = True,
    ) -> list[str]:
        """Run a script of one order.

        Raises:
            HoldLost: Redis does not have the order.
            and the other errors of `ScriptRunner.run`.
        """
        return await self._calls.run(
            script, order.sale_id, epoch=epoch, keys=keys, args=args, acked=acked
        )


def _reservation(
    sale_id: str, order_id: str, currency: str | None, fields: Mapping[str, str]
) -> Reservation | None:
    if not fields:
        return None
    if currency is None:
        raise SaleRecovering
    return as_reservation(sale_id, order_id, fields, currency=currency)
