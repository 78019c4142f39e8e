"""Transfers of stock between the partitions of a sale: lend.lua, lend_again.lua and borrow.lua.

A transfer has two steps in two slots. The donor lends units under the next number of donor,
receiver and SKU. Once SQL has the transfer's row, the receiver borrows them; until then, the units
are in transit.
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
    """A lend: its number, its units, and the total units of all lends up to this number."""

    number: int
    units: int
    up_to: int


class Overtaken(msgspec.Struct, frozen=True):
    """The number after the caller's last one belongs to another operation; `number` is the last.

    If the reply to an earlier attempt of the same operation was lost, that attempt may have lent
    units. The transfer's row in SQL then has the operation, and a worker completes the transfer.
    """

    number: int


class Due(msgspec.Struct, frozen=True):
    """Overdue holds whose expiry may free the units; at most as many as expire.lua accepts."""

    order_ids: tuple[str, ...]


class Dry(msgspec.Struct, frozen=True):
    """The partition lacks the units. After a borrow, `available` has the units left by SKU."""

    available: Mapping[str, int] = {}


class Transfer(msgspec.Struct, frozen=True, kw_only=True):
    """One transfer: its row in SQL."""

    sale_id: str
    donor: int
    receiver: int
    sku: str
    number: int
    #: Total units of all lends up to this number.
    up_to: int


class AlreadyReceived(msgspec.Struct, frozen=True):
    """The receiver already has this transfer or a later one; an earlier call may have held."""


class Received(msgspec.Struct, frozen=True):
    """The units that this call received, and the decision on the waiting order."""

    units: int
    #: None if no order waits.
    decision: HoldCreated | Replayed | Due | Dry | ReservationError | None


class Transfers:
    """Runs lend.lua and borrow.lua. Every call may be repeated."""

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
        """Lend up to this many units of a SKU to another partition (lend.lua).

        Args:
            sale_id: the sale.
            donor: the partition that lends the units.
            receiver: the partition that will receive them.
            epoch: of the donor.
            sku: the item.
            units: at least 1.
            after: the last number of this donor, receiver and SKU, as last read by the caller
                under this epoch.
            operation: the id of this lend: letters, digits, `-` and `_`; a repeat has the same.

        Raises:
            ValueError: an invalid partition number, a donor that is also the receiver, or an
                invalid operation.
            NotAcknowledged: the units are lent, but too few replicas have the change.
            and the other errors of `ScriptRunner.run`.
        """
        lane, _ = _lanes(sale_id, donor, receiver)
        if _OPERATION.fullmatch(operation) is None:
            raise ValueError(f"{operation!r} is not a valid id of a lend")
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

        The partition may be closed: these are the transfers on its server now.
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
        """Receive a transfer, and take the hold of the waiting order (borrow.lua).

        Args:
            transfer: its row in SQL. SQL must have every event of the donor up to the lend.
            epoch: of the receiver.
            waiting: the basket that needs the units, if any.

        Raises:
            SkuNotFound: the receiver does not have the item; the transfer stays open.
            ValueError: an invalid partition number, or a donor that is also the receiver.
            NotAcknowledged: the units are received, but too few replicas have the change.
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
    """The lane ids of the donor and the receiver.

    Raises:
        ValueError: an invalid partition number, or a donor that is also the receiver.
    """
    if donor == receiver:
        raise ValueError(f"partition {donor} cannot lend to itself")
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
