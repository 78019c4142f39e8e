"""Stored forms of a sale definition."""

import msgspec
import pytest

from reservation.domain.sale_settings import (
    SaleDefinition,
    change_of,
    digest_of,
    document_of,
    event_data_of,
    needs_upgrade,
    presentation_of,
    settings_of,
)
from reservation.domain.states import Visibility
from tests.support.in_process import sale_definition

NOW = 1_800_000_000_000
#: Of the plain definition, as release 0.1.0 stored it.
DIGEST = "f6a4087916a5da20cdb1fcaf36bebde6"
MEMBERS = [
    "name",
    "currency",
    "opens_at_ms",
    "closes_at_ms",
    "hold_seconds",
    "hold_policy",
    "virtual_accounts",
    "require_admission",
    "items",
]


def with_text(**texts: str) -> SaleDefinition:
    """The plain definition with a text or a picture of its item."""
    plain = sale_definition(NOW)
    items = (msgspec.structs.replace(plain.items[0], **texts),)
    return msgspec.structs.replace(plain, items=items)


LATER = [
    sale_definition(NOW, visibility=Visibility.DRAFT),
    sale_definition(NOW, description="Stoneware"),
    with_text(description="Stoneware"),
    with_text(image_url="/mug.png"),
]


def test_a_plain_definition_has_the_digest_and_the_document_of_release_0_1_0() -> None:
    plain = sale_definition(NOW)
    assert digest_of(plain, "op") == DIGEST
    assert list(msgspec.json.decode(document_of(plain))) == MEMBERS
    assert not needs_upgrade(plain)


@pytest.mark.parametrize("definition", LATER)
def test_a_later_member_changes_the_digest_and_needs_the_level(definition: SaleDefinition) -> None:
    assert digest_of(definition, "op") != DIGEST
    assert document_of(definition) != document_of(sale_definition(NOW))
    assert needs_upgrade(definition)


@pytest.mark.parametrize("definition", [sale_definition(NOW), *LATER])
def test_the_event_of_a_definition_gives_it_back(definition: SaleDefinition) -> None:
    data = event_data_of(definition, version=1, epoch="e" * 16, operator="op")
    assert change_of(data) == (definition, "op")


def test_the_hash_of_a_plain_sale_has_neither_visibility_nor_texts() -> None:
    settings = settings_of(sale_definition(NOW))
    assert (settings["visibility"], settings["presentation"]) == ("", "")


def test_the_hash_has_the_texts_of_the_items_that_have_any() -> None:
    settings = settings_of(with_text(description="Stoneware"))
    shown = presentation_of(settings["presentation"])
    assert (shown.description, list(shown.items)) == ("", ["a"])
    assert (shown.items["a"].description, shown.items["a"].image_url) == ("Stoneware", "")
