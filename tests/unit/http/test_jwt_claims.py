"""Rules for a buyer's token beyond its signature, on both paths that verify an HS256 token."""

import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest

from api.http.auth.hs256 import Hs256Verifier
from api.http.auth.jwt_claims import GUEST_AUDIENCE, LEEWAY_SECONDS, ClaimRules

SECRET = "a secret of more than thirty-two bytes for the tests"
ANY = ClaimRules(audience=None, issuer=None)
STRICT = ClaimRules(audience="reservation", issuer="https://id.shop.example")


def token(**claims: Any) -> str:
    body = {"sub": "kim", "exp": int(time.time()) + 3600, **claims}
    return jwt.encode(
        {name: value for name, value in body.items() if value is not None}, SECRET, "HS256"
    )


def verified(rules: ClaimRules, given: str) -> bool:
    """Verify by PyJWT and by the fast path for ordinary claims; both must agree."""
    secret = Hs256Verifier(SECRET, rules)
    outcomes: list[bool] = []
    # The fast path accepts only headers seen before.
    good = token(aud=rules.audience, iss=rules.issuer)
    for one in (given, good, given):
        try:
            secret.verified(one)
        except (jwt.PyJWTError, ValueError):
            outcomes.append(False)
        else:
            outcomes.append(True)
    first, control, second = outcomes
    assert control
    assert first == second
    return first


@pytest.mark.parametrize(
    ("claims", "valid"),
    [
        ({}, False),
        ({"aud": "reservation", "iss": "https://id.shop.example"}, True),
        ({"aud": ["billing", "reservation"], "iss": "https://id.shop.example"}, True),
        ({"aud": "billing", "iss": "https://id.shop.example"}, False),
        ({"aud": ["billing"], "iss": "https://id.shop.example"}, False),
        ({"aud": "reservation", "iss": "https://evil.example"}, False),
        ({"aud": "reservation"}, False),
        ({"iss": "https://id.shop.example"}, False),
    ],
)
def test_a_required_audience_and_issuer_must_match(claims: dict[str, Any], valid: bool) -> None:
    assert verified(STRICT, token(**claims)) is valid


@pytest.mark.parametrize("audience", [GUEST_AUDIENCE, [GUEST_AUDIENCE], ["shop", GUEST_AUDIENCE]])
def test_a_guest_token_is_not_accepted_as_a_shop_token(audience: Any) -> None:
    assert not verified(ANY, token(aud=audience))
    assert verified(ANY, token(aud="shop"))


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        (lambda now: {"nbf": now + LEEWAY_SECONDS // 2}, True),
        (lambda now: {"nbf": now + 10 * LEEWAY_SECONDS}, False),
        (lambda now: {"iat": now + LEEWAY_SECONDS // 2}, True),
        (lambda now: {"iat": now + 3600}, True),
        (lambda now: {"iat": "yesterday"}, True),
        (lambda _: {"jti": 12345}, True),
        (lambda now: {"exp": now - LEEWAY_SECONDS // 2}, True),
        (lambda now: {"exp": now - 10 * LEEWAY_SECONDS}, False),
    ],
)
def test_expiry_is_checked_with_a_leeway(
    change: Callable[[int], dict[str, Any]], *, valid: bool
) -> None:
    assert verified(ANY, token(**change(int(time.time())))) is valid
