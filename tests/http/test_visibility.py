"""Drafts, unlisted sales, descriptions and pictures."""

from typing import Any

import pytest

from tests.http.admin_calls import SALES, change, fresh, put, restock, shown
from tests.support.service import Served, eventually, item, refused, sale_document


def listed(served: Served, **parameters: str) -> set[str]:
    """The ids in the operators' list."""
    found: set[str] = set()
    cursor: dict[str, str] = {}
    while True:
        page = served.http.get(SALES, params={**parameters, **cursor}, headers=served.admin)
        page.raise_for_status()
        found |= {sale["saleId"] for sale in page.json()["sales"]}
        if page.json()["nextCursor"] is None:
            return found
        cursor = {"cursor": page.json()["nextCursor"]}


def offered(served: Served) -> set[str]:
    """The ids in the shoppers' list."""
    found: set[str] = set()
    cursor: dict[str, str] = {}
    while True:
        page = served.http.get("/v1/sales", params=cursor).raise_for_status().json()
        found |= {sale["saleId"] for sale in page["sales"]}
        if page["nextCursor"] is None:
            return found
        cursor = {"cursor": page["nextCursor"]}


def test_a_draft_is_shown_to_operators_alone(served: Served) -> None:
    sale_id = served.sale(visibility="draft")
    for path in (f"/v1/sales/{sale_id}", f"/v1/sales/{sale_id}/events"):
        refused(served.http.get(path), 404, "sale_not_found")
    own = served.http.get(f"/v1/sales/{sale_id}/reservations", headers=served.buyer())
    assert own.json()["code"] == "sale_not_found"
    assert shown(served, sale_id).json()["visibility"] == "draft"
    eventually(lambda: listed(served, visibility="draft"), lambda ids: sale_id in ids)
    assert sale_id not in offered(served)


@pytest.mark.parametrize("plain", [True, False])
def test_nothing_can_be_prepared_in_a_draft(served: Served, plain: bool) -> None:
    """On the fast path, and on the framework's route, which a body with a name takes."""
    sale_id = served.sale(visibility="draft")
    more: dict[str, Any] = {} if plain else {"orderName": "A gift"}
    answer = served.prepare(sale_id, served.buyer(), **more)
    refused(answer, 404, "sale_not_found")
    assert shown(served, sale_id).json()["items"][0]["available"] == 100


def test_a_published_draft_can_be_bought_at_once(served: Served) -> None:
    sale_id = served.sale(visibility="draft")
    assert served.prepare(sale_id, served.buyer()).status_code == 404
    assert change(served, sale_id, visibility="public").status_code == 200
    served.hold(sale_id, served.buyer())
    eventually(lambda: offered(served), lambda ids: sale_id in ids)


def test_an_unlisted_sale_sells_to_those_who_have_its_address(served: Served) -> None:
    sale_id = served.sale(visibility="unlisted")
    assert served.http.get(f"/v1/sales/{sale_id}").json()["visibility"] == "unlisted"
    served.hold(sale_id, served.buyer())
    eventually(lambda: listed(served, visibility="unlisted"), lambda ids: sale_id in ids)
    assert sale_id not in offered(served)


def test_a_published_sale_does_not_become_a_draft(served: Served) -> None:
    sale_id = served.sale()
    refused(change(served, sale_id, visibility="draft"), 400, "invalid_sale")
    assert change(served, sale_id, visibility="unlisted").status_code == 200
    assert change(served, sale_id, visibility="public").status_code == 200


def test_operators_list_sales_by_status(served: Served) -> None:
    open_id, paused_id = served.sale(), served.sale()
    where = f"{SALES}/{paused_id}/pause"
    served.http.post(where, json={"reason": "a test"}, headers=served.admin).raise_for_status()
    eventually(lambda: listed(served, status="paused"), lambda ids: paused_id in ids)
    assert open_id not in listed(served, status="paused")
    unknown = served.http.get(SALES, params={"status": "gone"}, headers=served.admin)
    assert unknown.status_code == 400


def test_pages_of_a_filtered_list_have_every_sale_once(served: Served) -> None:
    ids = {served.sale(visibility="draft") for _ in range(5)}
    eventually(lambda: listed(served, visibility="draft"), lambda found: ids <= found)
    seen: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        parameters = {"visibility": "draft", "limit": "2", **cursor}
        page = served.http.get(SALES, params=parameters, headers=served.admin).json()
        seen += [sale["saleId"] for sale in page["sales"]]
        if page["nextCursor"] is None:
            break
        cursor = {"cursor": page["nextCursor"]}
    assert len(seen) == len(set(seen))
    assert ids <= set(seen)


def test_descriptions_and_pictures_are_shown_and_can_be_removed(served: Served) -> None:
    items = [
        item("a", description="Stoneware,\n0.3 l", imageUrl="https://img.example.com/mug.webp"),
        item("b", imageUrl="/pictures/cap.png"),
        item("c"),
    ]
    sale_id = served.sale(description="겨울 세일", items=items)
    sale = served.http.get(f"/v1/sales/{sale_id}").json()
    assert sale["description"] == "겨울 세일"
    texts = [(one.get("description"), one.get("imageUrl")) for one in sale["items"]]
    assert texts == [
        ("Stoneware,\n0.3 l", "https://img.example.com/mug.webp"),
        (None, "/pictures/cap.png"),
        (None, None),
    ]
    # A restock keeps them; an update without them removes them.
    assert restock(served, sale_id, 1).json()["description"] == "겨울 세일"
    plain = [item("a", total=101), item("b"), item("c")]
    after = change(served, sale_id, description="", items=plain).json()
    assert "description" not in after
    assert not any("imageUrl" in one or "description" in one for one in after["items"])
    assert served.audit(sale_id)["ok"]


@pytest.mark.parametrize(
    "address",
    [
        "http://img.example.com/mug.png",
        "//img.example.com/mug.png",
        "/\\img.example.com/mug.png",
        "javascript:alert(1)",
        "data:image/png;base64,AAAA",
        "https://",
        "mug.png",
        "https://img.example.com/a b.png",
    ],
)
def test_a_picture_is_on_https_or_on_the_own_origin(served: Served, address: str) -> None:
    document = sale_document(items=[item("a", imageUrl=address)])
    refused(put(served, fresh(), document), 400, "invalid_sale")


def test_a_description_has_no_control_characters(served: Served) -> None:
    document = sale_document(description="a\x00b")
    assert put(served, fresh(), document).status_code == 400
