"""Plan of a seed: the sale, the crowd, and the faults."""

import random

import msgspec

__all__ = ["Plan"]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    seed: int
    buyers: int
    #: SKU, price, total and limit of each item.
    items: list[tuple[str, int, int, int]]
    hold_seconds: int
    hold_policy: str
    virtual_accounts: bool
    workers: int
    #: Time over which the buyers arrive, in seconds.
    seconds: float
    #: Number of faults injected meanwhile; 0 is none.
    faults: int

    @classmethod
    def of(cls, seed: int, *, faults: bool = True) -> "Plan":
        """The plan of a seed."""
        draw = random.Random(f"plan {seed}")
        buyers = draw.randint(20, 60)
        # Scarce: on average half of the buyers get a unit.
        totals = [draw.randint(1, max(2, buyers // 2)) for _ in range(draw.randint(1, 4))]
        items = [
            (f"sku-{at}", draw.choice((1000, 4900, 19_000)), total, draw.choice((1, 2, 5)))
            for at, total in enumerate(totals)
        ]
        seconds = draw.choice((5.0, 30.0, 90.0))
        return cls(
            seed=seed,
            buyers=buyers,
            items=items,
            hold_seconds=draw.choice((30, 60, 120)),
            hold_policy=draw.choice(("prepare", "prepare", "prepare", "success")),
            virtual_accounts=draw.random() < 0.4,
            workers=draw.choice((1, 2, 2)),
            seconds=seconds,
            faults=draw.randint(2, 14) if faults else 0,
        )
