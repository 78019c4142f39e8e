"""Runbook commands on a sale with an order, each with its own."""

import re
from collections.abc import Iterator

import pytest

from reservation.adapters.redis.embedded.files import socket_path_of
from tests.support.pages import ROOT, Place, a_place, blocks_of, typed_in_tables_of
from tests.support.service import Served, item, running_service

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

RUNBOOK = ROOT / "docs" / "operations.md"
BLOCKS = [line.split("  #")[0].strip() for line in "".join(blocks_of(RUNBOOK)).splitlines()]
TYPED = sorted({*BLOCKS, *typed_in_tables_of(RUNBOOK)})
#: The output of redis-cli if the server refuses; its exit status is 0 nevertheless.
REFUSED = re.compile(r"^\(?(error|ERR|NOPERM|WRONGTYPE|NOSCRIPT)\b", re.MULTILINE)


@pytest.fixture(scope="module")
def desk() -> Iterator[tuple[Place, Served]]:
    """An operator's place: a checkout, and its service."""
    with (
        a_place() as place,
        running_service(place.folder / "var", RESERVATION_WORKERS="1") as served,
    ):
        place.replaced["127.0.0.1:8000"] = served.url.removeprefix("http://")
        raise_an_alarm(served)
        yield place, served


def raise_an_alarm(served: Served) -> None:
    """Cause an alarm: the PG answers a confirm with another buyer's payment."""
    order = served.hold(served.sale(), served.buyer())
    served.order_fault(order, "other_order")
    served.open_success_url(order, served.pay(order))


def test_the_runbook_covers_each_failure() -> None:
    assert len(BLOCKS) >= 8
    assert len(TYPED) > len(BLOCKS) + 9
    typed = " ".join(TYPED)
    for command in ("rebuild", "why", "audit", "refund", "sale pause", "--eval"):
        assert command in typed


@pytest.mark.parametrize("line", TYPED)
def test_each_command_of_the_runbook_works(desk: tuple[Place, Served], line: str) -> None:
    place, served = desk
    sale_id = served.sale(items=[item("mug", price=12_000)])
    order = served.hold(sale_id, served.buyer(), items=[("mug", 1)], amount=12_000)
    # Only an unpaid order is released.
    if not line.startswith("reservation release"):
        assert served.open_success_url(order, served.pay(order)).json()["status"] == "CONFIRMED"
    if "archive" in line:
        # Only a closed sale is archived.
        path = f"/v1/admin/sales/{sale_id}/close"
        served.http.post(path, json={"reason": "over"}, headers=served.admin).raise_for_status()
    assert served.audit(sale_id)["lag"] == 0
    for word, real in {
        "SALE": sale_id,
        "SKU": "mug",
        "ORDER": order["orderId"],
        "TEXT": "'because of a test'",
    }.items():
        line = re.sub(rf"\b{word}\b", real, line)
    socket = socket_path_of((place.folder / "var").absolute())
    printed = place.run(
        line,
        before=f'export PATH="$PWD/.venv/bin:$PATH"\n'
        f'redis-cli() {{ command redis-cli -s "{socket}" "$@"; }}',
        RESERVATION_PORT=str(served.settings.port),
        RESERVATION_DATA_DIR=str(served.settings.data_dir),
        RESERVATION_ADMIN_API_KEY=served.settings.admin_api_key,
    )
    assert not REFUSED.search(printed), printed
    assert served.audit(sale_id)["ok"]
