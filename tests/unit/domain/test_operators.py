"""Operators: names in headers, the rights of roles, and the form of keys."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from reservation.client.operator import name_header
from reservation.domain.operators import (
    KEY_PREFIX,
    RIGHTS,
    Right,
    Role,
    digest_of_key,
    name_in_header,
    new_key,
    valid_name,
)


@given(st.text(min_size=1, max_size=40))
def test_each_valid_name_travels_in_a_header(text: str) -> None:
    name = valid_name(text)
    if name is None:
        return
    header = name_header(name)
    assert header.isascii()
    assert header.isprintable()
    assert name_in_header(header) == name


@given(st.text(st.characters(codec="latin-1"), max_size=40))
def test_no_header_breaks_the_parser(value: str) -> None:
    name = name_in_header(value)
    assert name is None or valid_name(name) == name


def test_an_ascii_name_is_sent_and_read_as_it_is() -> None:
    for name in ("Kim", "50% off", "a'b''c", "%EA%B9%80"):
        assert name_header(name) == name
        assert name_in_header(name) == name


def test_a_name_that_resembles_the_encoding_is_encoded() -> None:
    assert name_in_header(name_header("utf-8''x")) == "utf-8''x"


def test_a_decomposed_name_is_composed() -> None:
    assert valid_name("\u1100\u1161") == "\uac00"


def test_a_name_is_text_without_white_space_at_its_ends() -> None:
    for text in ("", " ", " Kim", "Kim ", "a\nb", "\u202eKim", "\ud800", "x" * 101):
        assert valid_name(text) is None


def test_each_role_has_the_rights_of_the_role_below_it() -> None:
    rights = [RIGHTS[role] for role in (Role.VIEWER, Role.SUPPORT, Role.MANAGER, Role.OWNER)]
    assert all(lower < higher for lower, higher in pairwise(rights))
    assert RIGHTS[Role.OWNER] == set(Right)
    assert set(RIGHTS) == set(Role)


def test_keys_are_random_and_recognisable() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith(KEY_PREFIX) and len(key) == len(KEY_PREFIX) + 43 for key in keys)
    assert len({digest_of_key(key) for key in keys}) == 100
