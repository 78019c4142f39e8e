"""Signed tokens: each is valid for one purpose only and fails after any change."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from reservation.domain.errors import InvalidToken
from reservation.domain.tokens import (
    ADMISSION_MINUTES,
    RETURN_CLAIM_MS,
    TOKEN_LIFE_MS,
    Claims,
    Page,
    Purpose,
    Signer,
)

NOW_MS = 1_800_000_000_000
OLD, NEW = "o" * 32, "n" * 32


def claims(purpose: Purpose = Purpose.RETURN, expires_at_ms: int = NOW_MS + 1) -> Claims:
    return Claims(
        purpose=purpose.value,
        sale_id="sale",
        order_id="sale-" + "A" * 24,
        buyer="customer-key",
        amount=1000,
        expires_at_ms=expires_at_ms,
        epoch="e",
        seq=7,
    )


@pytest.mark.parametrize("purpose", Purpose)
def test_a_token_is_valid_for_one_purpose(purpose: Purpose) -> None:
    signer = Signer([NEW])
    token = signer.sign(claims(purpose))
    assert signer.verify(token, purpose, now_ms=NOW_MS) == claims(purpose)
    for other in set(Purpose) - {purpose}:
        with pytest.raises(InvalidToken):
            signer.verify(token, other, now_ms=NOW_MS)


def test_a_token_expires() -> None:
    signer = Signer([NEW])
    with pytest.raises(InvalidToken):
        signer.verify(signer.sign(claims()), Purpose.RETURN, now_ms=NOW_MS + 2)


def test_each_listed_key_verifies_and_a_removed_one_does_not() -> None:
    token = Signer([OLD]).sign(claims())
    assert Signer([NEW, OLD]).verify(token, Purpose.RETURN, now_ms=NOW_MS) == claims()
    with pytest.raises(InvalidToken):
        Signer([NEW]).verify(token, Purpose.RETURN, now_ms=NOW_MS)


def test_a_token_with_any_changed_character_is_invalid() -> None:
    signer = Signer([NEW])
    token = signer.sign(claims())
    for place, character in enumerate(token):
        for other in {"A", "B", "_", ".", "é"} - {character}:
            with pytest.raises(InvalidToken):
                signer.verify(
                    token[:place] + other + token[place + 1 :], Purpose.RETURN, now_ms=NOW_MS
                )


def test_a_shortened_or_extended_token_is_invalid() -> None:
    signer = Signer([NEW])
    token = signer.sign(claims())
    for changed in (
        *(token[:end] for end in range(len(token))),
        token + "A",
        token + "=",
        token * 9,
    ):
        with pytest.raises(InvalidToken):
            signer.verify(changed, Purpose.RETURN, now_ms=NOW_MS)


@given(st.text(max_size=300))
def test_arbitrary_text_is_an_invalid_token(text: str) -> None:
    with pytest.raises(InvalidToken):
        Signer([NEW]).verify(text, Purpose.RETURN, now_ms=NOW_MS)


def test_a_return_token_reads_for_longer_than_it_claims() -> None:
    deadline_ms = NOW_MS
    token = claims(expires_at_ms=deadline_ms + TOKEN_LIFE_MS)
    assert token.may_claim(deadline_ms + RETURN_CLAIM_MS)
    assert not token.may_claim(deadline_ms + RETURN_CLAIM_MS + 1)


def test_an_admission_is_bound_to_sale_prices_buyer_and_time() -> None:
    signer, page = Signer([NEW]), Page("s", "a=1", NOW_MS)
    admission = signer.admission(page, "b", now_ms=NOW_MS)
    assert signer.admits(admission, page, "b", now_ms=NOW_MS)
    late_ms = NOW_MS + (ADMISSION_MINUTES + 1) * 60_000
    for other, buyer_id, now_ms in (
        (Page("t", "a=1", NOW_MS), "b", NOW_MS),
        (Page("s", "a=2", NOW_MS), "b", NOW_MS),
        (Page("s", "a=1", NOW_MS - 1), "b", NOW_MS),
        (page, "c", NOW_MS),
        (page, "", NOW_MS),
        (page, "b", late_ms),
    ):
        assert not signer.admits(admission, other, buyer_id, now_ms=now_ms)
    assert not Signer([OLD]).admits(admission, page, "b", now_ms=NOW_MS)


def test_an_admission_without_a_buyer_or_before_opening_is_invalid() -> None:
    signer, page = Signer([NEW]), Page("s", "a=1", NOW_MS)
    anonymous = signer.admission(page, "", now_ms=NOW_MS)
    assert not signer.admits(anonymous, page, "b", now_ms=NOW_MS)
    early = signer.admission(page, "b", now_ms=NOW_MS - 60_000)
    assert not signer.admits(early, page, "b", now_ms=NOW_MS)


@given(st.text(max_size=80))
def test_arbitrary_text_is_an_invalid_admission(text: str) -> None:
    assert not Signer([NEW]).admits(text, Page("s", "a=1", 0), "b", now_ms=NOW_MS)


@given(
    st.sampled_from(Purpose),
    st.text("ABCxyz019-_", min_size=24, max_size=24),
    st.text("ABCxyz019-_", min_size=32, max_size=32),
    st.integers(1, 2**53),
    st.integers(1, 9_999_999_999_999),
)
def test_batch_signing_gives_the_same_tokens_as_single_signing(
    purpose: Purpose, tail: str, buyer: str, seq: int, amount: int
) -> None:
    signer = Signer([NEW, OLD])
    template = replace(claims(purpose), amount=amount)
    own = replace(template, order_id=f"sale-{tail}", buyer=buyer, seq=seq)
    token = signer.batch_signer(template).sign(own.order_id, own.buyer, own.seq).decode()
    assert token == signer.sign(own)
    assert signer.verify(token, purpose, now_ms=NOW_MS) == own
