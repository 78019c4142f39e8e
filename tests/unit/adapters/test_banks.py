"""Bank codes of the PG: each code has a name, and each spelling of a bank maps to its code."""

import re

import pytest

from reservation.adapters.toss.banks import BANKS, Bank, bank_code, bank_of


@pytest.mark.parametrize("code", BANKS)
def test_each_bank_name_maps_to_its_code(code: str) -> None:
    bank = BANKS[code]
    assert re.fullmatch("[0-9]{2}", code)
    for name in (code, bank.korean, bank.english, *bank.words):
        assert bank_code(name) == code
        assert bank_code(f" {name.upper()} ") == code
    assert bank_of(code) is bank


@pytest.mark.parametrize(
    ("written", "code"),
    [
        ("20", "20"),
        ("020", "20"),
        ("004", "06"),
        ("국민", "06"),
        ("woori bank", "20"),
        ("SC", "23"),
    ],
)
def test_a_bank_name_matches_regardless_of_case_and_spacing(written: str, code: str) -> None:
    assert bank_code(written) == code


@pytest.mark.parametrize("text", ["", "99", "Bank of Nowhere", "0"])
def test_an_unlisted_bank_is_passed_through_to_the_pg(text: str) -> None:
    assert bank_code(text) == text
    assert bank_of(text) == Bank(text, text)
