"""Mix of buyers in a run, in shares of all."""

from collections import Counter
from collections.abc import Collection
from typing import Final

__all__ = ["MIX", "mix_of"]

#: Lives of each kind in a hundred.
MIX: Final = "pay=46,leave=12,decline=10,refresh=10,double=8,late=4,tamper=5,intrude=5"


def mix_of(text: str, kinds: Collection[str]) -> dict[str, int]:
    """`pay=50,leave=10` as shares of these kinds of buyers.

    Raises:
        ValueError: an unknown kind, a share that is not a number, or no buyers at all.
    """
    shares: Counter[str] = Counter()
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, _, share = part.partition("=")
        if kind not in kinds:
            raise ValueError(f"no buyer is called {kind!r}: there are {', '.join(kinds)}")
        if not share.isdecimal():
            raise ValueError(f"the share of {kind} is not a whole number: {share!r}")
        shares[kind] += int(share)
    if not shares.total():
        raise ValueError("a mix without any buyer")
    return dict(shares)
