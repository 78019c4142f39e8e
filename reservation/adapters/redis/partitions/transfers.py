"""Transfers of stock between the partitions of a sale: lend.lua, lend_again.lua and borrow.lua.

A transfer has two steps in two slots. The donor gives units up under the next number of donor,
receiver and SKU; once SQL has this row, the receiver takes them. Units in between are in transit.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.keys import Keys, SaleKeys, lane_of
from reservation.adapters.redis.mapping import as_items, as_mapping
from reservation.adapters.redis.prepare_script import (
    HoldCreated,
    Replayed,
    refusal_of,
    shared_fields,
    wish_args,
)
from reservation.adapters.redis.script_results import (
    BorrowWord,
    LendAgainWord,
    LendWord,
    PrepareWord,
    available_in,
)
from reservation.adapters.redis.script_runner import ScriptRunner
from reservation.domain.certificate import Lot
from reservation.domain.clock import Clock
from reservation.domain.errors import ReservationError, SkuNotFound
from reservation.domain.rate_limit import BuyerLimits
from reservation.domain.reservation import Basket
from reservation.domain.states import Status

__all__ = [
    "AlreadyReceived",
    "Dry",
    "Due",
    "Lent",
    "Overtaken",
    "Received",
    "Transfer",
    "Transfers",
]

_OPERATION: Final = re.compile(r"[A-Za-z0-9_-]+")
_HELD: Final = {BorrowWord.HELD: Status.HELD, BorrowWord.PREPARED: Status.PREPARED}


class Lent(msgspec.Struct, frozen=True):
    """A lend: its number, its units, and the units of all lends up to it."""

    number: int
    units: int
    up_to: int


class Overtaken(msgspec.Struct, frozen=True):
    """Another operation has made the lend after the caller's last one; this is the last number.

    If the reply to an earlier try of the same operation was lost, that try may have lent: SQL's
    row of the transfer then has the operation, and a worker finishes it.
    """

    number: int


class Due(msgspec.Struct, frozen=True):
    """Overdue holds that may free the units, at most as many as one call of expire.lua takes."""

    order_ids: tuple[str, ...]


class Dry(msgspec.Struct, frozen=True):
    """A partition lacks the units; `available` has those of each SKU of a waiting basket."""

    available: Mapping[str, int] = {}


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """One transfer, as SQL has it."""

    sale_id: str
    donor: int
    receiver: int
    sku: str
    number: int
    #: Units of all lends up to this number.
    up_to: int


class AlreadyReceived(msgspec.Struct, frozen=True):
    """The receiver has this transfer or a later one; a hold that waited may have been taken."""


class Received(msgspec.Struct, frozen=True):
    """The units that this call received, and the decision about the order that waits."""

    units: int
    #: None where no order waits.
    decision: HoldCreated | Replayed | Due | Dry | ReservationError | None


class Transfers:
    """Lends and borrows; each call may be repeated."""

    def __init__(
        self, connections: RedisClient, keys: Keys, *, clock: Clock, limits: BuyerLimits
    ) -> None:
        self._connections = connections
        self._calls = ScriptRunner(connections)
        self._keys = keys
        self._clock = clock
        self._limits = tuple(map(str, limits.args()))

    async def lend(
        self,
        sale_id: str,
        donor: int,
        receiver: int,
        *,
        epoch: str,
        sku: str,
        units: int,
        after: int,
        operation: str,
    ) -> Lent | Overtaken | Due | Dry:
        """Give up to this many units of a SKU to another partition (lend.lua).

        Args:
            sale_id: the sale.
            donor: the partition that gives the units up.
            receiver: the partition that they are for.
            epoch: of the donor.
            sku: the item.
            units: at least 1.
            after: the last number of this donor, receiver and SKU that the caller knows under
                this epoch.
            operation: names this lend, in letters, digits, `-` and `_`; a repeat has the same.

        Raises:
            ValueError: a partition that cannot be, one that would lend to itself, or an operation
                that is no name.
            NotAcknowledged: the units are lent, and too few replicas have the change.
            and the other errors of `ScriptRunner.run`.
        """
        lane, _ = _lanes(sale_id, donor, receiver)
        if _OPERATION.fullmatch(operation) is None:
            raise ValueError(f"{operation!r} is no name of a lend")
        names = self._keys.of(lane)
        reply = await self._calls.run(
            "lend",
            lane,
            epoch=epoch,
            keys=[names.sale, names.deadlines, names.outbox, names.transfers, names.stock(sku)],
            args=[self._clock.now_ms(), receiver, sku, units, after, operation],
        )
        word, *facts = reply
        match LendWord(word):
            case LendWord.LENT:
                return Lent(*map(int, facts))
            case LendWord.OVERTAKEN:
                return Overtaken(int(facts[0]))
            case LendWord.DUE:
                return Due(tuple(facts))
            case LendWord.DRY:
                return Dry()
            case LendWord.TOO_LATE | LendWord.RECOVERING | LendWord.WENT_BACK:
                raise AssertionError(word)

    async def read_received(self, sale_id: str, receiver: int, donor: int) -> dict[str, Lot]:
        """The last transfer of each SKU that a partition has received of a donor.

        The partition may be closed: this is what its server has now.
        """
        key = self._keys.of(lane_of(sale_id, receiver)).transfers
        fields = as_mapping(await self._connections.command("HGETALL", key))
        prefix = f"received:{donor}:"
        lots: dict[str, Lot] = {}
        for field, text in fields.items():
            if field.startswith(prefix):
                number, units = text.split(" ")
                lots[field.removeprefix(prefix)] = Lot(int(number), int(units))
        return lots

    async def lend_again(
        self, sale_id: str, donor: int, receiver: int, *, epoch: str, sku: str, has: Lot
    ) -> int | None:
        """Repeat the lends that the receiver has and the donor lost (lend_again.lua).

        Args:
            sale_id: the sale.
            donor: the partition that is rebuilt.
            receiver: the partition that has the units.
            epoch: of the rebuild.
            sku: the item.
            has: the receiver's last transfer of this donor and SKU.

        Returns:
            None once the donor has the lend, else its available units, which are too few.

        Raises:
            SaleRecovering: another rebuild has begun.
        """
        lane, _ = _lanes(sale_id, donor, receiver)
        names = self._keys.of(lane)
        word, *facts = await self._calls.run_unmarked(
            "lend_again",
            epoch=epoch,
            keys=[names.sale, names.outbox, names.transfers, names.stock(sku)],
            args=[receiver, sku, has.number, has.units],
        )
        return int(facts[0]) if LendAgainWord(word) is LendAgainWord.SHORT else None

    async def borrow(
        self, transfer: Transfer, *, epoch: str, waiting: Basket | None = None
    ) -> Received | AlreadyReceived:
        """Receive a transfer, and take the hold of the order that waits for it (borrow.lua).

        Args:
            transfer: the row in SQL, which has every event of the donor up to the lend.
            epoch: of the receiver.
            waiting: the basket for which a collector borrows, if any.

        Raises:
            SkuNotFound: the receiver does not have the item; the transfer stays open.
            ValueError: a partition that cannot be, or one that would lend to itself.
            NotAcknowledged: the units are received, and too few replicas have the change.
            and the other errors of `ScriptRunner.run`.
        """
        _, lane = _lanes(transfer.sale_id, transfer.donor, transfer.receiver)
        indices = {transfer.sku: 1}
        wish = wish_args(waiting.wish, indices) if waiting else ()
        reply = await self._calls.run(
            "borrow",
            lane,
            epoch=epoch,
            keys=_keys_of_borrow(self._keys.of(lane), indices, waiting),
            args=[
                self._clock.now_ms(),
                *self._limits,
                transfer.donor,
                transfer.number,
                transfer.up_to,
                len(indices),
                *indices,
                *wish,
            ],
        )
        return _received(BorrowWord(reply[0]), reply[1:], waiting)


def _lanes(sale_id: str, donor: int, receiver: int) -> tuple[str, str]:
    """The lanes of both ends of a transfer."""
    if donor == receiver:
        raise ValueError(f"partition {donor} would lend to itself")
    return lane_of(sale_id, donor), lane_of(sale_id, receiver)


def _keys_of_borrow(names: SaleKeys, skus: Mapping[str, int], waiting: Basket | None) -> list[str]:
    keys = [*names.of_prepare, names.transfers, *map(names.stock, skus)]
    if waiting is not None:
        keys += names.of_basket(waiting.order_id, waiting.buyer_id)
        keys.append(names.ended(waiting.buyer_id))
    return keys


def _received(
    word: BorrowWord, facts: Sequence[str], waiting: Basket | None
) -> Received | AlreadyReceived:
    match word:
        case BorrowWord.DONE:
            return AlreadyReceived()
        case BorrowWord.SKU_NOT_FOUND:
            raise SkuNotFound(sku=facts[0])
        case BorrowWord.BORROWED:
            return Received(int(facts[0]), _refusal(facts[1]))
        case BorrowWord.HELD | BorrowWord.PREPARED if waiting is not None:
            units, expires_at, created_at, seq, items = facts
            shared = shared_fields(
                waiting.sale_id,
                _HELD[word],
                waiting.wish,
                as_items(items),
                int(expires_at),
                int(created_at),
            )
            return Received(int(units), HoldCreated(shared, waiting, int(seq)))
        case _:
            raise AssertionError(word)


def _refusal(refusal: Sequence[str]) -> Replayed | Due | Dry | ReservationError | None:
    if not refusal:
        return None
    word, *facts = refusal
    match PrepareWord(word):
        case PrepareWord.REPLAYED:
            return Replayed()
        case PrepareWord.DUE:
            return Due(tuple(facts))
        case PrepareWord.DRY:
            return Dry(available_in(facts))
        case other:
            return refusal_of(other, facts)
