"""Collector: brings units of other partitions to the home partition of a waiting basket.

Invariants:

- A borrow is sent only after SQL has the row of the lend, so no loss can repeat its units.
- The last borrow takes the hold, so no other order takes the units that were borrowed for it.
- `sold_out` needs a certificate whose readings begin after the call.
- A call that ends between a lend and its borrow leaves an open transfer, which a worker finishes
  (`open_transfers.py`). No collector sends a borrow after `COLLECT_SECONDS_MAX`.

    round:  lacking SKUs in ascending order, and the peers of each in turn:
              lend -> row in SQL -> earlier transfers of this kind received -> borrow
            no peer has a SKU: certificate -> sold_out
            a pause of random length, because two collectors may take each other's units
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Mapping
from random import Random
from typing import Final, TypeVar

import msgspec
import structlog

from reservation.adapters.redis.errors import StoreUncertain
from reservation.adapters.redis.expiry import Expiry
from reservation.adapters.redis.keys import lane_of
from reservation.adapters.redis.partitions.readings import PartitionReader
from reservation.adapters.redis.partitions.transfers import (
    AlreadyReceived,
    Dry,
    Due,
    Lent,
    Overtaken,
    Transfer,
    Transfers,
)
from reservation.adapters.redis.prepare_script import HoldCreated, Replayed
from reservation.adapters.redis.script_results import RETRY_AFTER_SECONDS
from reservation.adapters.sql.store import SqlStore
from reservation.adapters.sql.transfers import LendRow
from reservation.domain.certificate import Certificate, Doubt, Reading, judge
from reservation.domain.errors import (
    OutcomeUnknown,
    PartitionDry,
    ReservationError,
    SoldOut,
    Unavailable,
)
from reservation.domain.reservation import Basket, Reservation

__all__ = ["COLLECT_SECONDS_MAX", "Collector", "PartitionedSale"]

log = structlog.get_logger(__name__)

#: Rounds of one call; more of them hold a buyer's connection while others take the units.
ROUNDS_MAX: Final = 3
#: The bound of one call. A worker leaves an open transfer alone for longer than this.
COLLECT_SECONDS_MAX: Final = 8.0
#: Bounds of the pause between two rounds, in seconds: about the time of a round.
PAUSE_SECONDS: Final = (0.02, 0.2)
#: How long a collector waits for the row of its lend, and for the borrows before its own. The
#: flusher of a busy sale is seldom behind by more than half a second.
WAIT_SECONDS_MAX: Final = 2.0
WAIT_PAUSE_SECONDS: Final = 0.01
#: Tries of one lend that other collectors overtake, or that overdue holds delay.
LENDS_MAX: Final = 8

Prepare = Callable[[Basket], Awaitable[Reservation | Replayed]]
Held = Reservation | Replayed
_Found = TypeVar("_Found")


class PartitionedSale(msgspec.Struct, frozen=True):
    """A sale of several partitions, and the epoch of each."""

    sale_id: str
    epochs: tuple[str, ...]


class _Call(msgspec.Struct):
    """One basket that waits, and the progress of its round."""

    sale: PartitionedSale
    home: int
    basket: Basket
    prepare: Prepare
    available: Mapping[str, int]
    #: The SKU that is collected, and the distance from the home partition to the peer asked last.
    sku: str = ""
    peer: int = 0

    @property
    def wants(self) -> dict[str, int]:
        return {line.sku: line.quantity for line in self.basket.wish.lines}

    def lacking(self) -> tuple[str, int] | None:
        """The first SKU of which the home partition has too few units, and how many."""
        for sku, units in sorted(self.wants.items()):
            if units > self.available.get(sku, 0):
                return sku, units - self.available.get(sku, 0)
        return None


class Collector:
    """Answers the baskets that are dry in their home partition."""

    def __init__(
        self,
        transfers: Transfers,
        reader: PartitionReader,
        expiry: Expiry,
        sql: SqlStore,
        *,
        draw: Random,
    ) -> None:
        self._transfers = transfers
        self._reader = reader
        self._expiry = expiry
        self._sql = sql
        self._draw = draw

    async def collect(
        self,
        sale: PartitionedSale,
        home: int,
        basket: Basket,
        dry: PartitionDry,
        prepare: Prepare,
    ) -> Held:
        """Hold the basket with units of all partitions.

        Args:
            sale: the sale, with the epochs that the caller knows.
            home: the buyer's partition.
            basket: the basket under the lane of the home partition.
            dry: the refusal of the home partition.
            prepare: sends the basket to the home partition again.

        Raises:
            SoldOut: the whole sale was short of a wanted SKU at an instant of this call.
            Unavailable: nothing is held, and the sale may have the units.
            OutcomeUnknown: the order may have its hold; a repeat under its key finds it.
            SaleRecovering: a partition is closed, or was rebuilt.
            ReservationError: the basket's own refusal.
        """
        call = _Call(sale, home, basket, prepare, dry.available)
        try:
            async with asyncio.timeout(COLLECT_SECONDS_MAX):
                return await self._rounds(call)
        except (TimeoutError, StoreUncertain) as error:
            # Its last step may have been the borrow that takes the hold.
            log.warning("collect_uncertain", sale_id=sale.sale_id, reason=repr(error))
            raise OutcomeUnknown(retryAfter=RETRY_AFTER_SECONDS) from error

    async def _rounds(self, call: _Call) -> Held:
        for number in range(ROUNDS_MAX):
            if number:
                await asyncio.sleep(self._draw.uniform(*PAUSE_SECONDS))
                held = await self._prepare(call)
                if held is not None:
                    return held
            call.sku, call.peer = "", 0
            held = await self._round(call)
            if held is not None:
                return held
        raise Unavailable(retryAfter=RETRY_AFTER_SECONDS)

    async def _prepare(self, call: _Call) -> Held | None:
        """Ask the home partition again; None while it is dry."""
        try:
            return await call.prepare(call.basket)
        except PartitionDry as dry:
            call.available = dry.available
            return None

    async def _round(self, call: _Call) -> Held | None:
        """Go once through the SKUs and the peers; None if the round ends without a hold.

        A round that would go back to an earlier SKU ends: another order took its units.

        Raises:
            SoldOut: no peer had a SKU, and a certificate proves that the sale is short of one.
        """
        count = len(call.sale.epochs)
        while (lacking := call.lacking()) is not None:
            sku, units = lacking
            if sku < call.sku:
                return None
            call.peer = call.peer + 1 if sku == call.sku else 1
            call.sku = sku
            if call.peer == count:
                await self._certify(call)
                return None
            donor = (call.home + call.peer) % count
            row = await self._lend(call, donor, sku, units)
            if row is not None:
                held = await self._borrow(call, donor, row)
                if held is not None:
                    return held
        return await self._prepare(call)

    async def _lend(self, call: _Call, donor: int, sku: str, units: int) -> LendRow | None:
        """Lend from a peer; its row in SQL, or None if the peer has no unit."""
        sale, operation, after = call.sale, secrets.token_hex(8), 0
        lane, epoch = lane_of(sale.sale_id, donor), sale.epochs[donor]
        for _ in range(LENDS_MAX):
            reply = await self._transfers.lend(
                sale.sale_id,
                donor,
                call.home,
                epoch=epoch,
                sku=sku,
                units=units,
                after=after,
                operation=operation,
            )
            match reply:
                case Lent(number):
                    return await self._row(lane, call.home, sku, number, operation)
                case Overtaken(number):
                    # An earlier try may have lent; a worker finishes it.
                    operation, after = secrets.token_hex(8), number
                case Due(order_ids):
                    await self._expiry.end(lane, order_ids, epoch=epoch)
                case Dry():
                    return None
        return None

    async def _row(
        self, lane: str, receiver: int, sku: str, number: int, operation: str
    ) -> LendRow:
        """Wait for the row of a lend.

        Raises:
            Unavailable: SQL does not have it in time, or another lend took its number after a loss.
        """

        async def find() -> LendRow | None:
            return await self._sql.transfers.get(lane, receiver, sku, number)

        row = await _until(find)
        if row is None or row.operation != operation:
            raise Unavailable(retryAfter=RETRY_AFTER_SECONDS)
        return row

    async def _borrow(self, call: _Call, donor: int, row: LendRow) -> Held | None:
        """Receive a lend once those before it were received, and take the hold if it completes it.

        A borrow stands for all lends up to its number, and those before it have collectors of
        their own.
        """
        sale, home = call.sale, call.home

        async def follows() -> bool | None:
            lots = await self._transfers.read_received(sale.sale_id, home, donor)
            has = lots[row.sku].number if row.sku in lots else 0
            return has >= row.number - 1 or None

        if await _until(follows) is None:
            raise Unavailable(retryAfter=RETRY_AFTER_SECONDS)
        transfer = Transfer(
            sale_id=sale.sale_id,
            donor=donor,
            receiver=home,
            sku=row.sku,
            number=row.number,
            up_to=row.up_to,
        )
        received = await self._transfers.borrow(
            transfer, epoch=sale.epochs[home], waiting=call.basket
        )
        if isinstance(received, AlreadyReceived):
            return await self._prepare(call)
        match received.decision:
            case HoldCreated() as created:
                return created.reservation()
            case Replayed() as replayed:
                return replayed
            case Dry(available):
                call.available = available
                return None
            case ReservationError() as refusal:
                raise refusal
            case _:
                return await self._prepare(call)

    async def _certify(self, call: _Call) -> None:
        """Refuse the basket if two rounds of readings prove that the sale is short.

        Raises:
            SoldOut: they do.
        """
        first = await self._read(call)
        second = await self._read(call)
        verdict = judge(first, second, call.wants)
        if isinstance(verdict, Certificate):
            available = {sku: sum(one.available[sku] for one in second) for sku in call.wants}
            raise SoldOut(available=available, nextDeadline=None)
        if verdict is Doubt.DUE:
            for reading in (*first, *second):
                lane = lane_of(call.sale.sale_id, reading.partition)
                if reading.due:
                    epoch = call.sale.epochs[reading.partition]
                    await self._expiry.end(lane, reading.due, epoch=epoch)

    async def _read(self, call: _Call) -> list[Reading]:
        sale, skus = call.sale, sorted(call.wants)
        count = len(sale.epochs)
        return await asyncio.gather(
            *(
                self._reader.read(sale.sale_id, place, epoch=epoch, partitions=count, skus=skus)
                for place, epoch in enumerate(sale.epochs)
            )
        )


async def _until(find: Callable[[], Awaitable[_Found | None]]) -> _Found | None:
    """Repeat a look until it finds something; None after WAIT_SECONDS_MAX."""
    loop = asyncio.get_running_loop()
    give_up_at = loop.time() + WAIT_SECONDS_MAX
    while True:
        found = await find()
        if found is not None or loop.time() >= give_up_at:
            return found
        await asyncio.sleep(WAIT_PAUSE_SECONDS)
