"""HS256 tokens: a fast path for valid tokens, as strict as PyJWT for all others."""

import hmac
import time
from base64 import urlsafe_b64encode
from typing import Any

import jwt
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.http.auth.hs256 import Hs256Verifier
from api.http.auth.jwt_claims import ClaimRules
from reservation.domain.hmac_sha256 import Mac

SECRET = "a secret that is long enough, even for the longest of its hashes: " + "x" * 8
RULES = ClaimRules(audience="shop", issuer=None)
NOW = int(time.time())
GOOD: dict[str, Any] = {"sub": "ann", "exp": NOW + 1000, "aud": "shop"}


def verifier() -> Hs256Verifier:
    """A verifier that has seen the usual header, so that its fast path is active."""
    secret = Hs256Verifier(SECRET, RULES)
    secret.verified(jwt.encode(GOOD, SECRET, algorithm="HS256"))
    return secret


def outcome(verified: Any, token: str) -> Any:
    try:
        return verified(token)
    except (jwt.PyJWTError, ValueError):
        return "refused"


def slowly(token: str) -> Any:
    claims = RULES.decode(token, SECRET, ["HS256"])
    return claims["sub"], float(claims["exp"])


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"exp": NOW - 10},
        {"exp": NOW - 500},
        {"exp": NOW + 0.5},
        {"exp": str(NOW + 1000)},
        {"exp": None},
        {"exp": -1},
        {"exp": "soon"},
        {"nbf": NOW + 500},
        {"nbf": NOW - 500},
        {"nbf": NOW + 10},
        {"iss": "https://shop.example"},
        {"iat": NOW + 500},
        {"iat": "now"},
        {"aud": "another"},
        {"aud": ["another", "shop"]},
        {"aud": None},
        {"sub": 1},
        {"sub": None},
        {"jti": 5},
        {"more": {"of": ["anything"]}},
    ],
)
def test_claims_are_validated_as_by_pyjwt(change: dict[str, Any]) -> None:
    token = jwt.encode(GOOD, SECRET, algorithm="HS256")
    header = token.partition(".")[0]
    body = msgspec.json.encode({**GOOD, **change})
    signed = f"{header}.{urlsafe_b64encode(body).rstrip(b'=').decode()}"
    mac = hmac.digest(SECRET.encode(), signed.encode(), "sha256")
    made = f"{signed}.{urlsafe_b64encode(mac).rstrip(b'=').decode()}"
    assert outcome(verifier().verified, made) == outcome(slowly, made)


@given(st.integers(0, 200), st.characters(codec="latin-1"))
def test_a_token_with_any_changed_byte_is_refused(at: int, put: str) -> None:
    token = jwt.encode(GOOD, SECRET, algorithm="HS256")
    at %= len(token)
    changed = token[:at] + put + token[at + 1 :]
    if changed != token:
        assert outcome(verifier().verified, changed) == outcome(slowly, changed)


@pytest.mark.parametrize(
    "token",
    [
        "",
        "..",
        "a.b.c",
        jwt.encode(GOOD, SECRET + "x", algorithm="HS256"),
        jwt.encode(GOOD, SECRET, algorithm="HS512"),
        "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbm4ifQ.",
    ],
)
def test_signatures_of_other_keys_and_algorithms_are_refused(token: str) -> None:
    assert outcome(verifier().verified, token) == "refused"


@given(st.binary(max_size=200), st.binary(max_size=300))
def test_a_prepared_key_gives_the_same_mac(key: bytes, message: bytes) -> None:
    assert Mac(key).digest(message) == hmac.digest(key, message, "sha256")
