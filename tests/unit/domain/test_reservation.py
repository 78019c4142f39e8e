"""Baskets and reservations as values: merged lines, the body's digest, the status for readers."""

import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reservation.application.reservations.prepare import wish_of
from reservation.domain.reservation import Line, Reservation, Wish, digest_of, merge_lines
from reservation.domain.sale import Item, Sale
from reservation.domain.states import HoldPolicy, SaleStatus, Status

wishes = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 50)), max_size=20)


SALE = Sale(
    sale_id="s",
    name="Sale",
    currency="KRW",
    opens_at_ms=0,
    closes_at_ms=1,
    hold_seconds=300,
    hold_policy=HoldPolicy.PREPARE,
    virtual_accounts=False,
    require_admission=False,
    switched=SaleStatus.OPEN,
    version=1,
    epoch="e",
    seq=1,
    items=tuple(
        Item(sku=sku, name=sku.upper(), price=1, total=1, limit_per_buyer=1) for sku in "abcd"
    ),
)


def wish(**changes: Any) -> Wish:
    members: dict[str, Any] = {
        "items": [("a", 1), ("b", 2)],
        "amount": 2000,
        "order_name": "Two things",
    }
    return wish_of(changes.pop("sale", SALE), **(members | changes))


def reservation(status: Status) -> Reservation:
    return Reservation(
        order_id="s-" + "A" * 24,
        sale_id="s",
        buyer_id="b",
        status=status,
        lines=(),
        amount=1,
        currency="KRW",
        order_name="n",
        created_at_ms=0,
        updated_at_ms=0,
        expires_at_ms=1000,
        seq=1,
    )


def test_lines_of_one_item_merge_at_the_first_position() -> None:
    merged = merge_lines([("b", 1), ("a", 2), ("b", 3)])
    assert merged == (Line(sku="b", quantity=4), Line(sku="a", quantity=2))


@given(wishes)
def test_merging_preserves_quantities_and_removes_duplicates(wish: list[tuple[str, int]]) -> None:
    merged = merge_lines(wish)
    skus = [line.sku for line in merged]
    assert len(set(skus)) == len(skus)
    for sku in {sku for sku, _ in wish}:
        [line] = [line for line in merged if line.sku == sku]
        assert line.quantity == sum(quantity for name, quantity in wish if name == sku)
    assert merge_lines((line.sku, line.quantity) for line in merged) == merged


@pytest.mark.parametrize(
    "changes",
    [
        {"items": [("a", 2), ("b", 2)]},
        {"items": [("a", 1), ("c", 2)]},
        {"items": [("a", 1)]},
        {"items": [("b", 2), ("a", 1)]},
        {"amount": 2001},
        {"order_name": "Another name"},
        {"order_name": None},
    ],
)
def test_different_bodies_have_different_digests(changes: dict[str, Any]) -> None:
    assert wish(**changes).digest != wish().digest


def test_the_digest_covers_only_the_buyers_input() -> None:
    """A default name may change with the sale; an admission is not part of the body."""
    renamed = msgspec.structs.replace(
        SALE, items=tuple(msgspec.structs.replace(item, name="New", price=7) for item in SALE.items)
    )
    unnamed, later = wish(order_name=None), wish(order_name=None, sale=renamed)
    assert (unnamed.order_name, later.order_name) == ("A +1", "New +1")
    assert unnamed.digest == later.digest
    assert wish(admitted=True).digest == wish().digest
    assert wish(items=[("a", 1), ("b", 1), ("b", 1)]).digest == wish().digest


def test_the_digest_needs_no_escaping_in_json() -> None:
    """prepare.lua inserts it into JSON unescaped."""
    assert re.fullmatch(r"[A-Za-z0-9_-]{12}", wish().digest)


@given(wishes, wishes)
def test_digests_are_equal_exactly_for_equal_wishes(
    one: list[tuple[str, int]], other: list[tuple[str, int]]
) -> None:
    first, second = (digest_of(merge_lines(lines), 2000, None) for lines in (one, other))
    assert (first == second) == (merge_lines(one) == merge_lines(other))


def test_wishes_compare_by_identity() -> None:
    assert wish() != wish()


@pytest.mark.parametrize("status", Status)
def test_a_hold_is_shown_as_expired_from_its_deadline_on(
    status: Status,
) -> None:
    waiting = status in (Status.HELD, Status.PREPARED)
    found = reservation(status)
    assert found.shown_status(999) is status
    assert found.shown_status(1000) is (Status.EXPIRED if waiting else status)
