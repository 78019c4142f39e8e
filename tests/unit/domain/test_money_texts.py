"""No answer after the start of a payment claims that no money moved: only the PG can show that."""

import re
from pathlib import Path

import pytest

from reservation.domain.errors import (
    AmountMismatch,
    BuyerLimitExceeded,
    HoldLost,
    InvalidToken,
    PaymentDeclined,
    ReservationError,
    ReservationExpired,
    SoldOut,
)

#: The errors that the success URL may answer with.
AT_SUCCESS = (
    AmountMismatch,
    BuyerLimitExceeded,
    HoldLost,
    InvalidToken,
    PaymentDeclined,
    ReservationExpired,
    SoldOut,
)
ROOT = Path(__file__).resolve().parents[3]
CLAIMS = re.compile(
    r"(nothing|no money|not) (was |is )?(charged|taken)|\uacb0\uc81c\ub418\uc9c0 \uc54a",
    re.IGNORECASE,
)
#: Shown while money may have moved; refusals of the address or page itself are excluded.
SHOWN = re.compile(
    r'"?(order\.\w+|result\.(?!invalid|unreadable|offline|awaiting_deposit|settling)[\w.]+'
    r"|error\.(?:sale_recovering|reservation_expired|hold_lost|payment_declined)"
    r'|released|endedElsewhere)"?: "([^"]*)"'
)


@pytest.mark.parametrize("error", AT_SUCCESS, ids=lambda error: error.__name__)
def test_a_refusal_at_the_success_url_makes_no_claim_about_charges(
    error: type[ReservationError],
) -> None:
    assert not CLAIMS.search(error.sentence)


def test_no_page_text_claims_that_nothing_was_charged() -> None:
    texts = SHOWN.findall((ROOT / "api/http/static/common/i18n.js").read_text())
    assert len(texts) > 50
    assert [text for text in texts if CLAIMS.search(text[1])] == []


@pytest.mark.parametrize(
    "name",
    [
        "application/payments/confirm.py",
        "adapters/redis/reservation_store.py",
        "application/payments/resolve.py",
    ],
)
def test_no_payment_sentence_claims_that_nothing_was_charged(name: str) -> None:
    assert not re.search(
        "nothing was charged", (ROOT / "reservation" / name).read_text(), re.IGNORECASE
    )
