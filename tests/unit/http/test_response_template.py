"""Pre-encoded response bodies equal the route's own, for every buyer of the batch."""

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.http.dependencies import ApiContext
from api.http.fastpath import response_template as templates
from api.http.fastpath.response_template import ANY_RESERVATION, ResponseTemplate
from api.http.prepare_endpoint import answer_of
from reservation.adapters.redis.prepare_script import HoldCreated, SharedFields
from reservation.application.reservations.prepare import Prepared
from reservation.domain.errors import BrokenInvariant
from reservation.domain.ids import OrderIds
from reservation.domain.reservation import Basket, Reservation
from reservation.domain.states import Status
from reservation.domain.tokens import Signer
from tests.support.lua_sale import plain_wish

NOW_MS = 1_800_000_000_000
BUYERS = st.text([chr(code) for code in range(33, 127) if chr(code) not in "{}"], min_size=1)


def api_with(**settings: Any) -> ApiContext:
    service = SimpleNamespace(
        signer=Signer(["new" * 12, "old" * 12]),
        order_ids=OrderIds(b"k" * 32),
        clock=SimpleNamespace(now_ms=lambda: NOW_MS),
        settings=SimpleNamespace(
            public_url="https://shop.example",
            toss_client_key="test_ck",
            toss_checkout_url="",
            **settings,
        ),
    )
    others: Any = {"buyers": None, "guests": None, "operators": None, "peers": None}
    return ApiContext(service=service, prepares=None, replays=None, **others)  # type: ignore[arg-type]


def reservation_with(**changes: Any) -> Reservation:
    return msgspec.structs.replace(
        ANY_RESERVATION,
        created_at_ms=NOW_MS - 5,
        updated_at_ms=NOW_MS - 5,
        expires_at_ms=NOW_MS + 300_000,
        **changes,
    )


@given(
    st.lists(st.tuples(BUYERS, st.integers(1, 2**53 - 1)), min_size=2, max_size=5),
    st.sampled_from((Status.HELD, Status.PREPARED)),
    st.text(min_size=1, max_size=100),
)
def test_batched_prepares_get_the_bodies_of_the_route(
    buyers: list[tuple[str, int]], status: Status, name: str
) -> None:
    api = api_with()
    shared = SharedFields(reservation_with(status=status, order_name=name))
    earlier = msgspec.structs.replace(
        shared.reservation, created_at_ms=1, updated_at_ms=1, expires_at_ms=2
    )
    answers = ResponseTemplate(api, earlier, "epoch").of_call(shared.reservation)
    for buyer_id, seq in buyers:
        order_id = api.service.order_ids.order_id(
            sale_id="sale", buyer_id=buyer_id, idempotency_key="k"
        )
        basket = Basket(
            sale_id="sale", order_id=order_id, buyer_id=buyer_id, wish=plain_wish(("a", 1))
        )
        made = HoldCreated(shared, basket, seq)
        route = answer_of(api, Prepared(made.reservation(), "epoch", replayed=False))
        assert answers.of(made) == msgspec.json.encode(route)


def test_a_template_without_its_placeholders_fails_at_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(templates, "_PLACES", templates._PLACES[::-1])
    with pytest.raises(BrokenInvariant):
        ResponseTemplate(api_with(), ANY_RESERVATION, "")
