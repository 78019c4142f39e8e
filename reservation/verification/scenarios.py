"""Scenarios: the lives of buyers with a hold, which every crowd shares.

A driver performs them its own way, and chooses how often each comes. A life returns the outcomes of
its parts in order.
"""

from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Final

from reservation.verification import buyer_requests as requests
from reservation.verification.buyer_requests import Order
from reservation.verification.scenario_steps import Pause, Scenario, ask_once, at_once
from reservation.verification.shopper import ENDS, Shopper

__all__ = ["LEFT", "LIVES", "ends_of", "live"]

Ends = tuple[str, ...]

#: Outcome of a buyer who sent nothing more.
LEFT: Final = "without a word"
#: Ends that the same page may overcome later, once the stock has come back.
_FOR_NOW: Final = frozenset({"expired", "reservation_expired", "sold_out", "buyer_limit_exceeded"})

#: Codes of a refused card.
_DECLINES: Final = ("REJECT_CARD_COMPANY", "EXCEED_MAX_AMOUNT", "INVALID_REJECT_CARD")
#: Loads of one success page at once.
_LOADS_MAX: Final = 5
#: Longest wait before a deposit, and before a release of an order that is being paid.
_DEPOSIT_SECONDS: Final = 60.0
_SECOND_THOUGHT_SECONDS: Final = 0.3


def live(shopper: Shopper, life: str, order: Order) -> Scenario[Ends]:
    """One of `LIVES`; perhaps the buyer reads the order once more after it."""
    ends = yield from LIVES[life](shopper, order)
    if shopper.draw.random() < shopper.crowd.habits.reads:
        yield requests.read(order["orderId"], shopper.headers)
    return ends


def pay(shopper: Shopper, order: Order) -> Scenario[Ends]:
    """Pay, come back."""
    key = yield from shopper.payment_key(order)
    word = yield from shopper.come_back(order, key)
    return (word,)


def leave(_shopper: Shopper, _order: Order) -> Scenario[Ends]:
    """Leave without a release."""
    yield from ()
    return (LEFT,)


def release(shopper: Shopper, order: Order) -> Scenario[Ends]:
    """Give the hold back, once or twice."""
    word = yield from shopper.release(order)
    if shopper.draw.random() < 0.3:
        word = yield from shopper.release(order)
    return (word,)


def release_or_leave(shopper: Shopper, order: Order) -> Scenario[Ends]:
    """Give the hold back, or leave without a release."""
    chosen = release if shopper.draw.random() < 0.5 else leave
    return (yield from chosen(shopper, order))


def change_mind(shopper: Shopper, order: Order) -> Scenario[Ends]:
    """Give the hold back, then pay after all."""
    released = yield from shopper.release(order)
    paid = yield from pay(shopper, order)
    return (released, *paid)


def decline(shopper: Shopper, order: Order) -> Scenario[Ends]:
    """Pay with a card that is refused, then with one that is not."""
    key = yield from shopper.payment_key(order, decline=shopper.draw.choice(_DECLINES))
    first = yield from shopper.come_back(order, key, never="a refused card")
    if first != "declined":
        return (first,)
    second = yield from pay(shopper, order)
    return (first, *second)


def refresh(shopper: Shopper, order: Order) -> Scenario[Ends]:
    """Load the success page again and again, at once and afterwards."""
    url = requests.success_url(order, (yield from shopper.payment_key(order)))
    shopper.crowd.say(order, "asked")
    loads = shopper.draw.randint(2, _LOADS_MAX)
    words = yield from at_once([shopper.open_success_url(order, url) for _ in range(loads)])
    words.append((yield from shopper.open_success_url(order, url)))
    ends = ends_of(words)
    if len(ends) > 1:
        shopper.crowd.accuse(f"{order['orderId']}: one payment ended as {sorted(ends)}")
        return (shopper.ended(order, f"repeats differ: {sorted(ends)}"),)
    return (shopper.ended(order, ends.pop() if ends else words[-1]),)


def late(shopper: Shopper, order: Order) -> Scenario[Ends]:
    """Come back from the PG about when the hold ends, or later."""
    crowd = shopper.crowd
    key = yield from shopper.payment_key(order)
    yield Pause(max(0.0, crowd.hold_seconds + shopper.draw.uniform(*crowd.habits.late_seconds)))
    word = yield from shopper.come_back(order, key)
    return (word,)


def tamper(shopper: Shopper, order: Order) -> Scenario[Ends]:
    """Come back with a lower amount; give up, or come back with the right one."""
    is_paid_in_full = shopper.draw.random() < 0.5
    key = yield from shopper.payment_key(order, amount=order["amount"] if is_paid_in_full else 1)
    shopper.crowd.say(order, "asked")
    url = requests.success_url(order, key, amount="1")
    answer = yield from shopper.ask(requests.come_back(url, "amount_mismatch"))
    if 0 < answer.status < HTTPStatus.BAD_REQUEST and order["amount"] > 1:
        shopper.crowd.accuse(f"{order['orderId']}: paid with an amount that is not its own")
    if is_paid_in_full:
        last = yield from shopper.come_back(order, key)
    else:
        last = yield from shopper.release(order)
    return (answer.code or str(answer.status), last)


def intrude(shopper: Shopper, order: Order) -> Scenario[Ends]:
    """Read, release and pay for another buyer's order; then release one's own."""
    others = [one for one in shopper.crowd.orders if one != order["orderId"]]
    if others:
        yield from _intrude(shopper, order, shopper.draw.choice(others))
    word = yield from shopper.release(order)
    return (word,)


def _intrude(shopper: Shopper, order: Order, other: str) -> Scenario[None]:
    key = yield from shopper.payment_key(order)
    stolen = requests.success_url(order, key, orderId=other)
    hidden = "reservation_not_found"
    headers = shopper.headers
    for tried, request in (
        ("read", requests.read(other, headers, hidden, name="intrude: read")),
        ("released", requests.release(other, headers, hidden, name="intrude: release")),
        ("paid", requests.come_back(stolen, "invalid_token", hidden, name="intrude: come back")),
    ):
        answer = yield from shopper.ask(request)
        if 0 < answer.status < HTTPStatus.BAD_REQUEST:
            shopper.crowd.accuse(f"{other}: {tried} by another buyer, {answer.status}")


def fail(shopper: Shopper, order: Order) -> Scenario[Ends]:
    """Leave the PG's page: the browser is sent to the fail URL."""
    shopper.crowd.say(order, "asked")
    answer = yield from shopper.ask(requests.fail(order))
    return (answer.code or str(answer.status),)


def pay_twice(shopper: Shopper, order: Order) -> Scenario[Ends]:
    """Pay in two windows, and come back from both at once."""
    first = yield from shopper.payment_key(order)
    second = yield from shopper.payment_key(order)
    words = yield from at_once([shopper.come_back(order, key) for key in (first, second)])
    shopper.crowd.say(order, "asked")
    return tuple(words)


def make_up_key(shopper: Shopper, order: Order) -> Scenario[Ends]:
    """Come back with a payment key that the PG never issued; pay after it, or not."""
    key = f"madeup{shopper.draw.getrandbits(64):x}"
    word = yield from shopper.come_back(order, key, never="a made-up payment key")
    if shopper.draw.random() < 0.5:
        return (word,)
    paid = yield from pay(shopper, order)
    return (word, *paid)


def transfer(shopper: Shopper, order: Order) -> Scenario[Ends]:
    """Pay by a virtual account, which the sale accepts or not; deposit sooner or later."""
    key = yield from shopper.payment_key(order, method="virtual_account")
    word = yield from shopper.come_back(order, key)
    # A deposit that is refused, because the account is not open yet, is left to the driver.
    shopper.crowd.accounts.append(key)
    yield Pause(shopper.draw.uniform(0, _DEPOSIT_SECONDS))
    yield from shopper.deposit(order, key)
    return (word,)


def release_while_paying(shopper: Shopper, order: Order) -> Scenario[Ends]:
    """Release the order in another window while its payment is confirmed."""
    key = yield from shopper.payment_key(order)
    words = yield from at_once([shopper.come_back(order, key), _release_soon(shopper, order)])
    shopper.crowd.say(order, "asked")
    return tuple(words)


def _release_soon(shopper: Shopper, order: Order) -> Scenario[str]:
    yield Pause(shopper.draw.uniform(0, _SECOND_THOUGHT_SECONDS))
    request = requests.release(order["orderId"], shopper.headers)
    answer = yield from ask_once(request)
    return answer.code or str(answer.status)


def ends_of(words: Iterable[str]) -> set[str]:
    """The ends of one payment in its buyer's answers: more than one word is a contradiction.

    A buyer who came too late, while another had the unit, gets it after all with the same page
    once it is available again. A paid order may be refunded. The history checker judges whether
    each word was true at its time.

    Args:
        words: in the order of the answers.
    """
    ends = [word for word in words if word in ENDS]
    for_good = set(ends) - _FOR_NOW
    if not for_good:
        return set(ends[-1:])
    return for_good - {"refunded"} or for_good


#: Every life, by its name.
LIVES: Final[Mapping[str, Callable[[Shopper, Order], Scenario[Ends]]]] = {
    life.__name__: life
    for life in (
        pay,
        leave,
        release,
        release_or_leave,
        change_mind,
        decline,
        refresh,
        late,
        tamper,
        intrude,
        fail,
        pay_twice,
        make_up_key,
        transfer,
        release_while_paying,
    )
}
