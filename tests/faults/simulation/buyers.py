"""Buyers of a simulated sale: each lives one drawn life, and its calls are recorded."""

from reservation.verification.scenario_steps import Pause, Scenario, perform
from reservation.verification.scenarios import live as live_with_hold
from reservation.verification.shopper import Habits, Shopper
from tests.faults.simulation.clients import Client

__all__ = ["HABITS", "live"]

HABITS = Habits(
    tries_max=12,
    pause_seconds=(0.0, 4.0),
    # Some give up at the first page without an outcome.
    loads=(1, 3, 6),
    # Holds last 30 to 120 seconds: some are back in time, some at the deadline, some too late.
    late_seconds=(-30.0, 60.0),
    items=(1, 1, 1, 1, 2, 2, 3),
    quantities=(1, 1, 1, 2),
    mispriced=0.02,
    reads=0.4,
)
#: A buyer's lives with a hold, and their weights.
_LIVES = {
    "pay": 40,
    "refresh": 12,
    "pay_twice": 8,
    "leave": 8,
    "release": 6,
    "change_mind": 2,
    "fail": 5,
    "decline": 8,
    "late": 8,
    "tamper": 4,
    "intrude": 3,
    "make_up_key": 3,
    "transfer": 4,
    "release_while_paying": 6,
}


async def live(client: Client, *, opens_within: float) -> None:
    """One buyer, from the first prepare on."""
    await client.pause(opens_within)
    shopper = Shopper(client.town.crowd, headers=client.credentials, draw=client.draw)
    await perform(_visit(shopper, client), client.send)


def _visit(shopper: Shopper, client: Client) -> Scenario[None]:
    draw = shopper.draw
    basket, key = shopper.basket(), shopper.new_key()
    clicks = 2 if draw.random() < 0.1 else 1
    # A refusal is not stored: the same key may be retried.
    for _ in range(draw.choice((1, 1, 2))):
        order = yield from shopper.prepare(basket, key=key, clicks=clicks)
        if not isinstance(order, str):
            life = draw.choices(list(_LIVES), weights=list(_LIVES.values()))[0]
            client.town.count(f"buyer {life}")
            yield Pause(draw.uniform(0.0, 6.0))
            yield from live_with_hold(shopper, life, order)
            return
        yield Pause(draw.uniform(0.0, 20.0))
