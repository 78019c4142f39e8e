"""Encodes a batch of baskets as one call of prepare.lua."""

from collections.abc import Sequence

import msgspec

from reservation.adapters.redis.keys import SaleKeys
from reservation.domain.reservation import Basket, Wish

__all__ = ["encode"]


def encode(
    names: SaleKeys,
    head: Sequence[str | int | float],
    baskets: Sequence[Basket],
    wishes: Sequence[Wish],
    *,
    in_turn: bool,
    waited: Sequence[int],
) -> tuple[list[str], list[str | int]]:
    """The keys and the arguments of the call.

    Args:
        names: the sale's key names.
        head: the first arguments, up to the buyers' limits.
        baskets: baskets of one sale, in the order of their decision.
        wishes: their distinct requests (lines and prices).
        in_turn: whether the baskets behind one that waits for overdue holds wait with it.
        waited: the positions, from 1, of the baskets that no overdue hold can help.
    """
    indices: dict[str, int] = {}
    asked_for: list[str | int] = []
    for wish in wishes:
        lines = [
            f"{indices.setdefault(line.sku, len(indices) + 1)} {line.quantity}"
            for line in wish.lines
        ]
        asked_for += (
            wish.digest,
            wish.order_name,
            msgspec.json.encode(wish.order_name).decode(),
            wish.amount,
            int(wish.admitted),
            " ".join(lines),
        )
    numbers = {wish: str(number) for number, wish in enumerate(wishes, 1)}
    keys = [*names.of_prepare, *map(names.stock, indices)]
    asked: list[str] = []
    for basket in baskets:
        keys += names.of_basket(basket.order_id, basket.buyer_id)
        asked.append(numbers[basket.wish])
    counts = (len(indices), len(wishes), len(baskets))
    turns = (int(in_turn), " ".join(map(str, waited)))
    return keys, [*map(str, head), *counts, " ".join(asked), *turns, *indices, *asked_for]
