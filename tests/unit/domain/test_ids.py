"""Ids: valid formats, and order ids that only the holder of the master key can derive."""

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reservation.adapters.redis.keys import Keys
from reservation.domain.ids import (
    BUYER_ID,
    IDEMPOTENCY_KEY,
    ORDER_ID,
    PAYMENT_KEY,
    SALE_ID,
    SKU,
    OrderIds,
    sale_of,
)

#: The order ids that the PG accepts.
PG_ORDER_ID = re.compile(r"[A-Za-z0-9_-]{6,64}")
IDS = OrderIds(b"k" * 32)

sale_ids = st.from_regex(SALE_ID, fullmatch=True)
buyer_ids = st.from_regex(BUYER_ID, fullmatch=True)
keys = st.from_regex(IDEMPOTENCY_KEY, fullmatch=True)


def fits(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None


@pytest.mark.parametrize(
    ("pattern", "longest"),
    [
        (SALE_ID, "s" * 32),
        (SKU, "a.b_c-" + "D" * 58),
        (BUYER_ID, "!" + "~" * 127),
        (IDEMPOTENCY_KEY, " " * 255),
        (ORDER_ID, "s" * 32 + "-" + "T" * 24),
        (PAYMENT_KEY, "k" * 200),
    ],
)
def test_an_id_is_accepted_up_to_its_maximum_length(pattern: str, longest: str) -> None:
    assert fits(pattern, longest)
    assert not fits(pattern, longest + "s")
    assert not fits(pattern, "")


@pytest.mark.parametrize("pattern", [SALE_ID, SKU, BUYER_ID, IDEMPOTENCY_KEY, PAYMENT_KEY])
@pytest.mark.parametrize("wrong", ["a\n", "\na", "a\0", "é", "a\r\nb", "\u2028", "\uff11"])
def test_an_id_rejects_control_and_non_ascii_characters(pattern: str, wrong: str) -> None:
    assert not fits(pattern, wrong)


@pytest.mark.parametrize("brace", ["{", "}", "{a}", "a}b", " "])
def test_an_id_rejects_braces_and_spaces(brace: str) -> None:
    for pattern in (SALE_ID, SKU, BUYER_ID, PAYMENT_KEY):
        assert not fits(pattern, brace)


@pytest.mark.parametrize("wrong", ["../x", "a/b", "a?b", "a.b", "a%2f"])
def test_a_payment_key_needs_no_escaping_in_a_path(wrong: str) -> None:
    assert not fits(PAYMENT_KEY, wrong)


@given(sale_ids, buyer_ids, keys)
def test_an_order_id_fits_the_pg_and_names_its_sale(sale_id: str, buyer_id: str, key: str) -> None:
    order_id = IDS.order_id(sale_id=sale_id, buyer_id=buyer_id, idempotency_key=key)
    assert PG_ORDER_ID.fullmatch(order_id)
    assert sale_of(order_id) == sale_id
    assert fits(ORDER_ID, order_id)
    again = OrderIds(b"k" * 32).order_id(sale_id=sale_id, buyer_id=buyer_id, idempotency_key=key)
    assert again == order_id


@given(st.tuples(sale_ids, buyer_ids, keys), st.tuples(sale_ids, buyer_ids, keys))
def test_different_requests_have_different_order_ids(
    one: tuple[str, str, str], other: tuple[str, str, str]
) -> None:
    assume(one != other)
    first, second = (
        IDS.order_id(sale_id=sale_id, buyer_id=buyer_id, idempotency_key=key)
        for sale_id, buyer_id, key in (one, other)
    )
    assert first != second


def test_the_boundary_of_buyer_id_and_key_is_part_of_the_order_id() -> None:
    one = IDS.order_id(sale_id="s", buyer_id="ab", idempotency_key="c")
    assert one != IDS.order_id(sale_id="s", buyer_id="a", idempotency_key="bc")
    # A key that resembles the length prefix of a buyer's id.
    two = IDS.order_id(sale_id="s", buyer_id="1", idempotency_key="1:a")
    assert two != IDS.order_id(sale_id="s", buyer_id="11:", idempotency_key="a")


def test_a_different_master_key_gives_different_ids() -> None:
    other = OrderIds(b"o" * 32)
    request = {"sale_id": "s", "buyer_id": "b", "idempotency_key": "k"}
    assert IDS.order_id(**request) != other.order_id(**request)
    assert IDS.customer_key("b") != other.customer_key("b")


@given(buyer_ids)
def test_a_customer_key_is_valid_at_the_pg_and_hides_the_buyer(buyer_id: str) -> None:
    key = IDS.customer_key(buyer_id)
    assert re.fullmatch(r"[A-Za-z0-9_-]{32}", key)
    assert len(buyer_id) < 4 or buyer_id not in key


@given(st.text(max_size=80))
def test_an_invalid_order_id_has_no_sale(text: str) -> None:
    named = sale_of(text)
    assert named is None or text.startswith(f"{named}-")
    assert sale_of(f"{text}\n") is None


@given(sale_ids, sale_ids, buyer_ids, buyer_ids)
def test_different_ids_have_different_redis_keys(
    sale_id: str, other_sale: str, buyer_id: str, other_buyer: str
) -> None:
    """A buyer id that imitates another key cannot reach that key."""

    def all_keys(sale: str, buyer: str) -> list[str]:
        names = Keys().of(sale)
        return [
            names.sale,
            names.deadlines,
            names.confirming,
            names.deposits,
            names.operations,
            names.outbox,
            names.stock("a"),
            names.order("o"),
            names.buyer(buyer),
            names.buyer_orders(buyer),
            names.rate(buyer),
        ]

    own = all_keys(sale_id, buyer_id)
    assert len(set(own)) == len(own)
    # Redis hashes the text between the first brace and the next closing one for the slot.
    assert {key[key.index("{") + 1 : key.index("}")] for key in own} == {sale_id}
    if sale_id != other_sale:
        assert not set(own) & set(all_keys(other_sale, buyer_id))
    if buyer_id != other_buyer:
        names = Keys().of(sale_id)
        of_buyer = (names.buyer, names.buyer_orders, names.rate)
        assert not {key(buyer_id) for key in of_buyer} & {key(other_buyer) for key in of_buyer}
