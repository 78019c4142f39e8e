"""How a batch of baskets is written as one call of prepare.lua."""

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
        names: of the sale's keys.
        head: the first arguments, up to the buyers' limits.
        baskets: all of one sale, in the order in which they are decided.
        wishes: what they ask for, each once.
        in_turn: whether those behind a basket that meets holds which ran out wait with it.
        waited: the places, from 1 on, of the baskets that such holds keep waiting no more.
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
