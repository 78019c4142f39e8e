"""JWKS of the shop: outages, withdrawn keys, malformed key sets."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from api.http.auth.bearer import Connection
from api.http.auth.buyers import Buyers
from api.http.auth.jwks import FRESH_SECONDS, RETRY_SECONDS, STALE_SECONDS, PublishedKeys
from reservation.config.settings import Settings
from reservation.domain.errors import Unauthenticated, Unavailable
from tests.support.requests import REQUESTS

pytestmark = pytest.mark.system


class Clock:
    """A monotonic clock that moves by hand."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Provider:
    """An identity provider whose key set is any body, or none."""

    def __init__(self) -> None:
        self.private = {name: rsa.generate_private_key(65537, 2048) for name in ("one", "two")}
        self.body: bytes = b""
        self.up = True
        self.drip_seconds = 0.0
        self.asked = 0
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.asked += 1
                body = provider.body
                self.send_response(200 if provider.up else 503)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if not provider.drip_seconds:
                    self.wfile.write(body)
                    return
                for byte in body:
                    try:
                        self.wfile.write(bytes([byte]))
                    except OSError:
                        return
                    time.sleep(provider.drip_seconds)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Keep the output of the tests free of access logs."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/keys"
        self.publish("one")

    def publish(self, *names: str, **changes: Any) -> None:
        self.body = json.dumps({"keys": [self.jwk(name) | changes for name in names]}).encode()

    def jwk(self, name: str) -> dict[str, Any]:
        public = RSAAlgorithm.to_jwk(self.private[name].public_key(), as_dict=True)
        return {**public, "kid": name, "alg": "RS256", "use": "sig"}

    def token(self, key: str = "one") -> str:
        claims = {"sub": "kim", "exp": int(time.time()) + 7200}
        return jwt.encode(claims, self.private[key], algorithm="RS256", headers={"kid": key})


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider()
    thread = threading.Thread(target=provider.server.serve_forever, daemon=True)
    thread.start()
    yield provider
    provider.server.shutdown()
    provider.server.server_close()
    thread.join(10)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(provider: Provider, clock: Clock) -> PublishedKeys:
    return PublishedKeys(provider.url, clock)


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b'"keys"',
        b"{}",
        b'{"keys": []}',
        b'{"keys": ["one"]}',
        b'{"keys": {"one": 1}}',
        b'{"keys": [{"kid": "one", "kty": "unknown"}]}',
        b"\xff\xfe",
        b"{" * 100_000,
        b'{"keys": "' + b"x" * 300_000 + b'"}',
    ],
)
async def test_an_unreadable_key_set_makes_authentication_unavailable(
    provider: Provider, keys: PublishedKeys, body: bytes
) -> None:
    provider.body = body
    with pytest.raises(Unavailable):
        await keys.key_for(provider.token())


async def test_an_unreachable_key_set_is_unavailable_until_it_returns(
    provider: Provider, keys: PublishedKeys, clock: Clock
) -> None:
    provider.up = False
    with pytest.raises(Unavailable):
        await keys.key_for(provider.token())
    provider.up = True
    clock.now += RETRY_SECONDS + 1
    assert (await keys.key_for(provider.token())).key_id == "one"


async def test_an_unknown_key_is_refused_only_while_the_key_set_can_be_fetched(
    provider: Provider, keys: PublishedKeys, clock: Clock
) -> None:
    await keys.key_for(provider.token("one"))
    clock.now += RETRY_SECONDS + 1
    with pytest.raises(Unauthenticated):
        await keys.key_for(provider.token("two"))
    provider.up = False
    clock.now += RETRY_SECONDS + 1
    with pytest.raises(Unavailable):
        await keys.key_for(provider.token("two"))
    # A known key is accepted until the keys are stale.
    assert (await keys.key_for(provider.token("one"))).key_id == "one"
    clock.now += STALE_SECONDS
    with pytest.raises(Unavailable):
        await keys.key_for(provider.token("one"))


async def test_a_trickling_key_set_delays_requests_for_seconds_only(
    provider: Provider, keys: PublishedKeys
) -> None:
    provider.drip_seconds = 0.5
    async with asyncio.timeout(20):
        with pytest.raises(Unavailable):
            await keys.key_for(provider.token())


@pytest.mark.parametrize(
    "change", [{"use": "enc"}, {"alg": "RSA-OAEP", "use": "enc"}, {"alg": "HS256"}]
)
async def test_an_encryption_key_is_not_used(
    provider: Provider, keys: PublishedKeys, change: dict[str, Any]
) -> None:
    odd = provider.jwk("two") | change
    provider.body = json.dumps({"keys": [provider.jwk("one"), odd]}).encode()
    assert (await keys.key_for(provider.token("one"))).key_id == "one"
    with pytest.raises(Unauthenticated):
        await keys.key_for(provider.token("two"))


async def test_a_short_rsa_key_is_not_used(provider: Provider, keys: PublishedKeys) -> None:
    provider.private["two"] = rsa.generate_private_key(65537, 1024)
    provider.publish("one", "two")
    assert (await keys.key_for(provider.token("one"))).key_id == "one"
    with pytest.warns(jwt.warnings.InsecureKeyLengthWarning):
        signed = provider.token("two")
    with pytest.raises(Unauthenticated):
        await keys.key_for(signed)


def request_with(token: str) -> Connection:
    return REQUESTS.get("/", headers={"Authorization": f"Bearer {token}"})


async def test_a_withdrawn_key_invalidates_its_tokens(
    served_settings: Settings, provider: Provider, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.http.auth.buyers.PublishedKeys", lambda url: PublishedKeys(url, clock))
    buyers = Buyers(msgspec.structs.replace(served_settings, auth="jwt", jwks_url=provider.url))
    provider.publish("one", "two")
    old, new = provider.token("one"), provider.token("two")
    assert await buyers.buyer(request_with(old)) == "kim"
    assert buyers.buyer_of_cached(old) == "kim"
    asked = provider.asked
    provider.publish("two")
    clock.now += FRESH_SECONDS + 1
    # Cached verifications are repeated once the keys are no longer fresh.
    assert buyers.buyer_of_cached(old) is None
    with pytest.raises(Unauthenticated):
        await buyers.buyer(request_with(old))
    assert await buyers.buyer(request_with(new)) == "kim"
    assert buyers.buyer_of_cached(old) is None
    assert buyers.buyer_of_cached(new) == "kim"
    assert provider.asked == asked + 1


async def test_an_unreachable_provider_is_not_called_at_each_request(
    served_settings: Settings, provider: Provider, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.http.auth.buyers.PublishedKeys", lambda url: PublishedKeys(url, clock))
    buyers = Buyers(msgspec.structs.replace(served_settings, auth="jwt", jwks_url=provider.url))
    token = provider.token()
    await buyers.buyer(request_with(token))
    provider.up = False
    clock.now += FRESH_SECONDS + 1
    asked = provider.asked
    for _ in range(20):
        assert await buyers.buyer(request_with(token)) == "kim"
    assert provider.asked == asked + 1
    assert buyers.buyer_of_cached(token) == "kim"


@pytest.fixture
def served_settings(tmp_path: Any) -> Settings:
    return Settings.load({"RESERVATION_DATA_DIR": str(tmp_path)}, dotenv_path=None)
