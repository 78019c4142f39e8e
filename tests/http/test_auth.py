"""Authentication of the shop's buyers: tokens by a shared secret, or by its published keys."""

import hmac
import json
import threading
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.algorithms import RSAAlgorithm

from api.http.auth import operators as operators_module
from api.http.auth.bearer import Connection
from api.http.auth.buyers import Buyers
from api.http.auth.client_address import ClientAddressResolver
from api.http.auth.operator_keys import OperatorKeys
from api.http.auth.operators import Operators
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.operator_keys import OperatorKeyRepository
from reservation.config.settings import Settings
from reservation.domain.clock import SystemClock
from reservation.domain.errors import MalformedRequest, RateLimited, Unauthenticated
from reservation.domain.operators import Operator, Right, Role
from tests.support.requests import REQUESTS
from tests.support.service import Served, refused, running_service

SECRET = "what-the-shop-and-the-service-share"
HOUR_SECONDS = 3600
ADMIN = Operator(role=Role.OWNER)
#: Latency of the shop: long enough that a crowd arrives meanwhile.
SHOP_SECONDS = 0.3


class Shop:
    """Signs its buyers in, and publishes the keys that it does so with."""

    def __init__(self) -> None:
        self.keys = {name: rsa.generate_private_key(65537, 2048) for name in ("one", "two")}
        self.published = ["one"]
        self.asked = 0
        shop = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                shop.asked += 1
                time.sleep(SHOP_SECONDS)
                body = json.dumps({"keys": [shop.jwk(name) for name in shop.published]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Keep the output of the tests free of access logs."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/keys"

    def jwk(self, name: str) -> dict[str, Any]:
        public = self.keys[name].public_key()
        jwk = RSAAlgorithm.to_jwk(public, as_dict=True)
        return {**jwk, "kid": name, "alg": "RS256", "use": "sig"}

    def public_pem(self, name: str) -> bytes:
        return (
            self.keys[name]
            .public_key()
            .public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )

    def token(self, subject: str, *, key: str = "one", kid: str | None = None) -> str:
        headers = {"kid": kid or key}
        return jwt.encode(claims(subject), self.keys[key], algorithm="RS256", headers=headers)


def claims(subject: str, **more: Any) -> dict[str, Any]:
    return {"sub": subject, "exp": int(time.time()) + HOUR_SECONDS, **more}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def signed_with(secret: bytes, body: dict[str, Any]) -> str:
    """A token of HS256 by hand: the library refuses a public key as a secret."""

    def part(data: bytes) -> str:
        return urlsafe_b64encode(data).rstrip(b"=").decode()

    head = json.dumps({"alg": "HS256", "typ": "JWT", "kid": "one"}).encode()
    message = f"{part(head)}.{part(json.dumps(body).encode())}"
    return f"{message}.{part(hmac.digest(secret, message.encode(), 'sha256'))}"


@pytest.fixture(scope="module")
def shop() -> Iterator[Shop]:
    shop = Shop()
    thread = threading.Thread(target=shop.server.serve_forever, daemon=True)
    thread.start()
    yield shop
    shop.server.shutdown()
    shop.server.server_close()
    thread.join(10)


@pytest.fixture(scope="module")
def by_keys(tmp_path_factory: pytest.TempPathFactory, shop: Shop) -> Iterator[Served]:
    with running_service(
        tmp_path_factory.mktemp("by-keys"),
        RESERVATION_WORKERS="1",
        RESERVATION_AUTH="jwt",
        RESERVATION_JWKS_URL=shop.url,
    ) as service:
        yield service


@pytest.fixture(scope="module")
def by_secret(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with running_service(
        tmp_path_factory.mktemp("by-secret"),
        RESERVATION_WORKERS="1",
        RESERVATION_AUTH="jwt",
        RESERVATION_JWT_SECRET=SECRET,
    ) as service:
        yield service


def test_concurrent_first_requests_share_one_key_fetch(by_keys: Served, shop: Shop) -> None:
    """The first test of this module: nothing was fetched yet."""
    sale_id = by_keys.sale()
    with ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(
                lambda number: by_keys.prepare(sale_id, bearer(shop.token(f"buyer-{number}"))),
                range(12),
            )
        )
    assert {answer.status_code for answer in answers} == {201}
    assert shop.asked == 1


def test_the_subject_of_the_token_is_the_buyer(by_keys: Served, shop: Shop) -> None:
    sale_id = by_keys.sale()
    order = by_keys.hold(sale_id, bearer(shop.token("kim@shop.example")))
    assert (
        by_keys.get_reservation(order, bearer(shop.token("kim@shop.example")))["status"] == "HELD"
    )
    path = f"/v1/reservations/{order['orderId']}"
    answer = by_keys.http.get(path, headers=bearer(shop.token("lee@shop.example")))
    refused(answer, 404, "reservation_not_found")


def test_tokens_not_signed_by_the_shop_are_refused(by_keys: Served, shop: Shop) -> None:
    sale_id = by_keys.sale()
    # A known attack: the published key used as a shared secret.
    forged = signed_with(shop.public_pem("one"), claims("eve"))
    for token in (
        forged,
        jwt.encode(claims("eve"), SECRET, algorithm="HS256", headers={"kid": "one"}),
        jwt.encode(claims("eve"), by_keys.settings.jwt_secret, algorithm="HS256"),
        jwt.encode(claims("eve"), "", algorithm="none", headers={"kid": "one"}),
        shop.token("eve", key="two", kid="one"),
        shop.token("eve", key="two"),
    ):
        refused(by_keys.prepare(sale_id, bearer(token)), 401, "unauthenticated")
    assert by_keys.stock(sale_id) == (100, 0, 0)


def test_invented_key_ids_cause_no_key_fetches(by_keys: Served, shop: Shop) -> None:
    before = shop.asked
    for number in range(20):
        token = shop.token("eve", key="two", kid=f"made-up-{number}")
        refused(by_keys.prepare("any", bearer(token)), 401, "unauthenticated")
    # At most one in ten seconds, which a slow machine may pass.
    assert shop.asked - before <= 2


def test_a_token_signed_with_the_shared_secret_is_accepted(by_secret: Served) -> None:
    sale_id = by_secret.sale()
    token = jwt.encode(claims("kim", aud="the-shop"), SECRET, algorithm="HS256")
    assert by_secret.hold(sale_id, bearer(token))["status"] == "HELD"
    for wrong in (
        jwt.encode(claims("kim"), "x" * 40, algorithm="HS256"),
        jwt.encode({"sub": "kim"}, SECRET, algorithm="HS256"),
        jwt.encode(claims("kim") | {"exp": 1}, SECRET, algorithm="HS256"),
        jwt.encode(claims("kim {a}"), SECRET, algorithm="HS256"),
    ):
        refused(by_secret.prepare(sale_id, bearer(wrong)), 401, "unauthenticated")


@pytest.mark.parametrize("subject", ["", "kim lee", "{kim}", "k" * 129, "김", 7])
def test_the_refusal_of_a_subject_states_its_format(by_secret: Served, subject: Any) -> None:
    token = jwt.encode(claims(subject), SECRET, algorithm="HS256")
    problem = refused(by_secret.prepare(by_secret.sale(), bearer(token)), 401, "unauthenticated")
    assert "The `sub` claim must be 1 to 128 printable ASCII characters" in problem["detail"]


def test_guests_are_disabled_with_shop_tokens(by_secret: Served) -> None:
    assert by_secret.http.post("/v1/guests").status_code == 404


def operators_of(settings: Settings) -> Operators:
    """Operators without a database: only the admin API key is valid."""
    keys = OperatorKeys(OperatorKeyRepository(Database("sqlite:///unused.db")), clock=SystemClock())
    return Operators(settings, Buyers(settings), ClientAddressResolver(settings), keys)


@pytest.mark.parametrize("name", ["", "x" * 101, "new\nline"])
def test_production_requires_an_operator_name(served: Served, name: str) -> None:
    production: Settings = msgspec.structs.replace(served.settings, env="production")
    operators = operators_of(production)
    with pytest.raises(MalformedRequest):
        operators.name(REQUESTS.get("/", headers={"X-Operator": name}), ADMIN)
    assert operators.name(REQUESTS.get("/", headers={"X-Operator": "Kim"}), ADMIN) == "Kim"


async def test_wrong_admin_keys_are_logged_and_rate_limited_by_address(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    # Another test of this process may have configured where log lines go.
    monkeypatch.setattr(
        operators_module,
        "log",
        SimpleNamespace(warning=lambda event, **facts: logged.append(f"{event} {facts}")),
    )
    settings = served.settings
    operators = operators_of(settings)

    def request(key: str, address: str) -> Connection:
        found = REQUESTS.get("/", headers=bearer(key))
        found.scope["client"] = (address, 4000)
        return found

    refusals: list[str] = []
    for number in range(2_000):
        with pytest.raises((Unauthenticated, RateLimited)) as refusal:
            await operators.admit(request(f"guess-{number}", "203.0.113.8"), Right.READ)
        refusals.append(refusal.value.code)
        if refusals[-1] == "rate_limited":
            break
    assert refusals[-1] == "rate_limited"
    assert len(refusals) > 300
    # The right key still passes from there, and others are not slowed.
    await operators.admit(request(settings.admin_api_key, "203.0.113.8"), Right.KEYS)
    with pytest.raises(Unauthenticated):
        await operators.admit(request("guess", "203.0.113.9"), Right.READ)
    lines = "\n".join(logged)
    assert "operator_sign_in_failed" in lines
    assert "203.0.113.8" in lines
    assert "guess-" not in lines
