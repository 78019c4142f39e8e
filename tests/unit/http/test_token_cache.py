"""Cache of verified buyer tokens: an entry never outlives its token."""

import time

import pytest

from api.http.auth import token_cache as remembered
from api.http.auth.token_cache import LIFE_SECONDS_MIN, TokenCache

NOW = 1_700_000_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [NOW]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> TokenCache:
    monkeypatch.setattr(remembered, "GENERATION_MAX", 3)
    return TokenCache()


def test_a_token_is_cached_until_it_expires(clock: list[float]) -> None:
    tokens = TokenCache()
    assert tokens.buyer("a") is None
    tokens.keep("a", "ann", NOW + 3600)
    clock[0] = NOW + 3599.9
    assert tokens.buyer("a") == "ann"
    clock[0] = NOW + 3600
    assert tokens.buyer("a") is None


def test_no_cached_token_outlives_its_expiry(clock: list[float]) -> None:
    tokens = TokenCache()
    tokens.keep("long", "ann", NOW + 7200)
    tokens.keep("short", "bob", NOW + 100)
    tokens.keep("longer", "cy", NOW + 9000)
    clock[0] = NOW + 99
    assert tokens.buyer("short") == "bob"
    clock[0] = NOW + 100
    assert tokens.buyer("short") is None


def test_a_reverified_token_is_cached_again(clock: list[float]) -> None:
    """A token that was evicted together with an expired one."""
    tokens = TokenCache()
    tokens.keep("short", "bob", NOW + 100)
    tokens.keep("long", "ann", NOW + 7200)
    clock[0] = NOW + 100
    assert tokens.buyer("long") is None
    tokens.keep("long", "ann", NOW + 7200)
    clock[0] = NOW + 7199
    assert tokens.buyer("long") == "ann"


def test_a_token_expiring_within_a_minute_is_not_cached(clock: list[float]) -> None:
    """Its expiry would soon clear the whole cache."""
    tokens = TokenCache()
    tokens.keep("long", "ann", NOW + 7200)
    tokens.keep("late", "bob", NOW + LIFE_SECONDS_MIN - 0.1)
    assert tokens.buyer("late") is None
    clock[0] = NOW + LIFE_SECONDS_MIN
    assert tokens.buyer("long") == "ann"


@pytest.mark.usefixtures("clock")
def test_the_previous_generation_is_cached_and_the_one_before_dropped(small: TokenCache) -> None:
    for number in range(7):
        small.keep(f"token-{number}", f"buyer-{number}", NOW + 3600)
    known = [small.buyer(f"token-{number}") for number in range(7)]
    assert known == [None, None, None, "buyer-3", "buyer-4", "buyer-5", "buyer-6"]
