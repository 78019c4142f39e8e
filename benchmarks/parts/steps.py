"""CPU time of each step of a prepare in Python, one after the other, without network and Redis.

python -m benchmarks.parts.steps
"""

import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import uvloop

from api.http.app import context_of
from api.http.auth.guests import Guests
from api.http.connection.head import HEAD_ENDS, read_head
from api.http.fastpath.response_template import ResponseTemplate
from api.http.middleware import record, request_id
from api.http.schemas.reservations import PrepareRequest
from reservation.adapters.redis.prepare_script import BatchReply, HoldCreated
from reservation.adapters.redis.script_results import PrepareWord
from reservation.application.reservations.prepare import wish_of
from reservation.application.sales.catalog import CachedSale
from reservation.bootstrap import opened
from reservation.config.settings import Settings
from reservation.domain.reservation import Basket
from reservation.domain.sale import Item, Sale
from reservation.domain.states import HoldPolicy, SaleStatus

#: Repeats of each step in a round, and rounds; the best round counts, because a disturbance only
#: ever makes one longer.
TIMES: Final = 2_000
ROUNDS: Final = 15

BODY = b'{"items":[{"sku":"shoe-42","quantity":1}],"amount":129000}'
NOW_MS = time.time_ns() // 1_000_000
SALE = Sale(
    sale_id="bench",
    name="Bench",
    currency="KRW",
    opens_at_ms=NOW_MS - 1,
    closes_at_ms=NOW_MS + 86_400_000,
    hold_seconds=600,
    hold_policy=HoldPolicy.PREPARE,
    virtual_accounts=False,
    require_admission=False,
    switched=SaleStatus.OPEN,
    version=1,
    epoch="0" * 16,
    seq=1,
    items=(
        Item(
            sku="shoe-42",
            name="A shoe",
            price=129_000,
            total=10,
            limit_per_buyer=2,
            available=10,
            held=0,
            sold=0,
        ),
    ),
)
#: The reply of prepare.lua for a batch: held until, held since, and the items of its one wish.
HELD = (str(NOW_MS + 600_000), str(NOW_MS), ["17", "0" * 32], '[["shoe-42",1,129000]]')
SEQ: Final = 17


def request_of(token: str) -> bytes:
    """A prepare as it comes."""
    lines = [
        "POST /v1/sales/bench/reservations HTTP/1.1",
        "Host: 127.0.0.1:8000",
        f"Authorization: Bearer {token}",
        "Idempotency-Key: 5d0bfa1c",
        "Content-Type: application/json",
        f"Content-Length: {len(BODY)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + BODY


def microseconds(step: Callable[[Any], Any], given: list[Any]) -> float:
    """The best round's time for one."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for one in given:
            step(one)
        best = min(best, time.perf_counter() - began)
    return best / len(given) * 1e6


async def measure(data_dir: Path) -> dict[str, float]:
    """Each step and its microseconds."""
    settings = Settings.load(
        {
            "RESERVATION_DATA_DIR": str(data_dir),
            "RESERVATION_REDIS_URL": "redis://127.0.0.1:1",
            "RESERVATION_TOSS_API_URL": "http://127.0.0.1:1",
        },
        None,
    )
    async with opened(settings) as service:
        api = context_of(settings, service)
        guests = Guests(msgspec.structs.replace(settings, guest_rate=None))
        buyers = [guests.new("") for _ in range(TIMES)]
        known = CachedSale(SALE, SALE.epoch, 0.0)
        decoder = msgspec.json.Decoder(PrepareRequest)
        wish = wish_of(SALE, [("shoe-42", 1)], 129_000)

        def basket_of(buyer: tuple[str, str]) -> Basket:
            return service.preparation.basket(known, buyer[0], "5d0bfa1c", wish)

        def verified(buyer: tuple[str, str]) -> str | None:
            return api.buyers.buyer_of_cached(buyer[1])

        newcomers = iter([guests.new("")[1] for _ in range(TIMES * ROUNDS)])

        def verified_first(_: None) -> str | None:
            return api.buyers.buyer_of_cached(next(newcomers))

        def parsed(request: bytes) -> None:
            read_head(request[: request.index(HEAD_ENDS)])

        def admitted(buyer: tuple[str, str]) -> float:
            return api.prepares.wait(buyer[0], time.monotonic()) if api.prepares else 0.0

        common = BatchReply(SALE.sale_id, PrepareWord.HELD, HELD, [wish])
        baskets = [basket_of(buyer) for buyer in buyers]
        orders = [made(common, basket) for basket in baskets]
        shared = orders[0].shared.reservation
        answers = ResponseTemplate(api, shared, SALE.epoch).of_call(shared)
        return {
            "parse the request": microseconds(parsed, [request_of(buyer[1]) for buyer in buyers]),
            "verify a new buyer's token": microseconds(verified_first, [None] * TIMES),
            "remember a known buyer's": microseconds(verified, buyers),
            "decode and check the body": microseconds(decoder.decode, [BODY] * TIMES),
            "an id for the request": microseconds(request_id, [b""] * TIMES),
            "the buyer's rate": microseconds(admitted, buyers),
            "the basket, with its order id": microseconds(basket_of, buyers),
            "the script's reply as an order": microseconds(
                lambda basket: made(common, basket), baskets
            ),
            "two tokens, the customer key, the answer": microseconds(answers.of, orders),
            "count it": microseconds(
                lambda _: record("prepareReservation", 201, 0.004, ""), [None] * TIMES
            ),
        }


def made(common: BatchReply, basket: Basket) -> HoldCreated:
    """The answer to a held basket."""
    order = common.decision_of(basket, SEQ)
    if not isinstance(order, HoldCreated):
        raise TypeError(order)
    return order


def main() -> int:
    """Measure and print."""
    with tempfile.TemporaryDirectory(prefix=f"steps-{secrets.token_hex(2)}") as data_dir:
        found = uvloop.run(measure(Path(data_dir)))
    for step, cost in found.items():
        sys.stdout.write(f"{cost:6.2f} us  {step}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
