"""Access rights: every endpoint against every credential that does not open it.

    no or a bad credential                           401 on read, list and release
    a good one of another buyer, order or purpose    404 on read and release,
                                                     403 on success and fail
    operators' endpoints                             none or bad 401, a buyer's token 403

After each attempt every key of the sale is unchanged.
"""

import re
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from typing import Any
from warnings import catch_warnings

import httpx
import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from jwt.warnings import InsecureKeyLengthWarning

from reservation.domain.tokens import TOKEN_LIFE_MS, Claims, Purpose, Signer
from tests.support.service import Served, refused, sale_document

Call = Callable[[dict[str, str]], httpx.Response]

HOUR_SECONDS = 3600


class Stage:
    """One order under attack, and its neighbours."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.sale_id, self.other_sale = served.sale(), served.sale()
        self.buyer_id, self.buyer = served.named_buyer()
        self.other_buyer = served.buyer()
        self.order = served.hold(self.sale_id, self.buyer)
        self.second = served.hold(self.sale_id, self.buyer)
        self.theirs = served.hold(self.sale_id, self.other_buyer)
        self.elsewhere = served.hold(self.other_sale, self.buyer)
        self.payment_key = served.pay(self.order)
        # Until SQL has it all, an answer could differ for that reason.
        assert served.audit(self.sale_id)["ok"]

    def token(self, purpose: Purpose, signer: Signer | None = None, **changes: Any) -> str:
        """A token of the order, made like the service's own but for the changes."""
        claims = Claims(
            purpose=purpose.value,
            sale_id=self.sale_id,
            order_id=self.order["orderId"],
            buyer=self.order["payment"]["customerKey"],
            amount=1000,
            expires_at_ms=int(time.time() * 1000) + TOKEN_LIFE_MS,
            epoch="",
            seq=2,
        )
        return (signer or self.served.signer).sign(msgspec.structs.replace(claims, **changes))

    def jwt_by_private_key(self) -> str:
        """A token that declares RS256 where the service verifies by a secret."""
        private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        claims = {"sub": self.buyer_id, "exp": int(time.time()) + HOUR_SECONDS}
        return jwt.encode(claims | {"aud": "reservation-guest"}, private, algorithm="RS256")

    def jwt(self, secret: str | None = None, algorithm: str = "HS256", **claims: Any) -> str:
        """A buyer's token, made like the service's own but for the changes."""
        body = {
            "sub": self.buyer_id,
            "exp": int(time.time()) + HOUR_SECONDS,
            "aud": "reservation-guest",
            **claims,
        }
        body = {name: value for name, value in body.items() if value is not None}
        key = self.served.settings.jwt_secret if secret is None else secret
        with catch_warnings(action="ignore", category=InsecureKeyLengthWarning):
            return jwt.encode(body, key if algorithm != "none" else "", algorithm=algorithm)


@pytest.fixture(scope="module")
def stage(served: Served) -> Stage:
    return Stage(served)


@pytest.fixture(autouse=True)
def nothing_changes(stage: Stage) -> Iterator[None]:
    """Every test in here is an attempt that must leave no trace."""
    sales = (stage.sale_id, stage.other_sale)
    before = [stage.served.dump(sale_id) for sale_id in sales]
    yield
    assert [stage.served.dump(sale_id) for sale_id in sales] == before
    assert stage.served.ledger(stage.order)["charged"] == 0


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def one_bit_other(token: str) -> str:
    """The same token with one bit of its last byte's data flipped."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    place = len(token) - 5
    other = alphabet[alphabet.index(token[place]) ^ 1]
    return token[:place] + other + token[place + 1 :]


def unsigned(token: str) -> str:
    """The token with a header that declares no signature."""
    header = urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').rstrip(b"=").decode()
    return f"{header}.{token.split('.')[1]}."


#: Bearer tokens that are not a buyer's.
BAD_BUYERS: dict[str, Callable[[Stage], dict[str, str]]] = {
    "nothing": lambda _: {},
    "an empty header": lambda _: {"Authorization": ""},
    "a scheme alone": lambda _: {"Authorization": "Bearer"},
    "another scheme": lambda stage: {
        "Authorization": stage.buyer["Authorization"].replace("Bearer", "Basic")
    },
    "no token at all": lambda _: bearer("x"),
    "the admin key": lambda stage: {
        "Authorization": f"Bearer {stage.served.settings.admin_api_key}"
    },
    "a wrong secret": lambda stage: bearer(stage.jwt(secret="x" * 43)),
    "an empty secret": lambda stage: bearer(stage.jwt(algorithm="none")),
    "algorithm none": lambda stage: bearer(unsigned(stage.jwt())),
    "signed by another private key": lambda stage: bearer(stage.jwt_by_private_key()),
    "another algorithm": lambda stage: bearer(stage.jwt(algorithm="HS512")),
    "an ended token": lambda stage: bearer(stage.jwt(exp=int(time.time()) - 60)),
    "a token without end": lambda stage: bearer(stage.jwt(exp=None)),
    "a token for another audience": lambda stage: bearer(stage.jwt(aud="somebody")),
    "a token without an audience": lambda stage: bearer(stage.jwt(aud=None)),
    "a token without a subject": lambda stage: bearer(stage.jwt(sub=None)),
    "a subject with braces": lambda stage: bearer(stage.jwt(sub="a}{b")),
    "a subject with a blank": lambda stage: bearer(stage.jwt(sub="a b")),
    "a subject with a newline": lambda stage: bearer(stage.jwt(sub="a\n")),
    "an empty subject": lambda stage: bearer(stage.jwt(sub="")),
    "a long subject": lambda stage: bearer(stage.jwt(sub="a" * 129)),
    "one bit changed": lambda stage: bearer(one_bit_other(stage.jwt())),
    "cut": lambda stage: bearer(stage.jwt()[:-4]),
    "without its signature": lambda stage: bearer(stage.jwt().rsplit(".", 1)[0] + "."),
    "very long": lambda _: bearer("x" * 6000),
    "a reservation's token": lambda stage: bearer(stage.order["token"]),
}


def _grafted(stage: Stage, purpose: Purpose) -> str:
    """The mac of one token under the payload of another."""
    version, key, _, mac = stage.token(purpose).split(".")
    payload = stage.token(purpose, amount=1).split(".")[2]
    return f"{version}.{key}.{payload}.{mac}"


#: Reservation tokens that are none of ours any more, or never were.
BAD_TOKENS: dict[str, Callable[[Stage, Purpose], str]] = {
    "made up": lambda *_: "v1.aaaaaaaa.bbbb.cccc",
    "no token": lambda *_: "x",
    "very long": lambda *_: "x" * 2000,
    "ended": lambda stage, purpose: stage.token(purpose, expires_at_ms=1),
    "one bit changed": lambda stage, purpose: one_bit_other(stage.token(purpose)),
    "cut": lambda stage, purpose: stage.token(purpose)[:-2],
    "with more at its end": lambda stage, purpose: stage.token(purpose) + "A",
    "without its mac": lambda stage, purpose: stage.token(purpose).rsplit(".", 1)[0] + ".",
    "of another key": lambda stage, purpose: stage.token(purpose, Signer(["k" * 43])),
    "of another version": lambda stage, purpose: "v2" + stage.token(purpose)[2:],
    "with another payload": _grafted,
    "a buyer's": lambda stage, _: stage.jwt(),
}


def read(stage: Stage, headers: dict[str, str]) -> httpx.Response:
    return stage.served.http.get(f"/v1/reservations/{stage.order['orderId']}", headers=headers)


def release(stage: Stage, headers: dict[str, str]) -> httpx.Response:
    path = f"/v1/reservations/{stage.order['orderId']}/release"
    return stage.served.http.post(path, headers=headers)


def beacon(stage: Stage, token: str) -> httpx.Response:
    path = f"/v1/reservations/{stage.order['orderId']}/release"
    return stage.served.http.post(path, content=token, headers={"Content-Type": "text/plain"})


def open_success_url(stage: Stage, token: str, **changes: str) -> httpx.Response:
    return stage.served.open_success_url(stage.order, stage.payment_key, token=token, **changes)


def fails(stage: Stage, token: str, **query: str) -> httpx.Response:
    return stage.served.http.get(
        "/v1/payments/toss/fail", params={"token": token, "code": "PAY_PROCESS_CANCELED", **query}
    )


@pytest.mark.parametrize("who", BAD_BUYERS)
def test_anonymous_callers_cannot_prepare_list_read_or_release(stage: Stage, who: str) -> None:
    headers = BAD_BUYERS[who](stage)
    mine = f"/v1/sales/{stage.sale_id}/reservations"
    for answer in (
        stage.served.prepare(stage.sale_id, headers),
        stage.served.http.get(mine, headers=headers),
        read(stage, headers),
        release(stage, headers),
    ):
        refused(answer, 401, "unauthenticated")


def test_another_buyer_gets_reservation_not_found(stage: Stage) -> None:
    refused(read(stage, stage.other_buyer), 404, "reservation_not_found")
    refused(release(stage, stage.other_buyer), 404, "reservation_not_found")


def test_another_buyer_cannot_distinguish_an_existing_order(stage: Stage) -> None:
    """Guessing ids yields nothing."""
    real = read(stage, stage.other_buyer).json()
    path = f"/v1/reservations/{stage.sale_id}-{'z' * 24}"
    made_up = stage.served.http.get(path, headers=stage.other_buyer).json()
    assert {**real, "instance": ""} == {**made_up, "instance": ""}


def test_a_list_has_only_the_callers_orders(stage: Stage) -> None:
    path = f"/v1/sales/{stage.sale_id}/reservations"
    listed = stage.served.http.get(path, headers=stage.other_buyer).json()["reservations"]
    assert [order["orderId"] for order in listed] == [stage.theirs["orderId"]]


@pytest.mark.parametrize("which", BAD_TOKENS)
@pytest.mark.parametrize("purpose", [Purpose.RESERVATION, Purpose.READ])
def test_an_invalid_token_neither_reads_nor_releases(
    stage: Stage, which: str, purpose: Purpose
) -> None:
    token = BAD_TOKENS[which](stage, purpose)
    headers = {"X-Reservation-Token": token}
    for answer in (read(stage, headers), release(stage, headers), beacon(stage, token)):
        refused(answer, 401, "unauthenticated")


def test_the_buyers_credentials_do_not_repair_an_invalid_token(stage: Stage) -> None:
    """A request that carries both means the token: a page must not release by accident."""
    headers = {**stage.buyer, "X-Reservation-Token": "v1.aaaaaaaa.bbbb.cccc"}
    refused(release(stage, headers), 401, "unauthenticated")


@pytest.mark.parametrize("other", ["second", "theirs", "elsewhere"])
def test_a_token_of_another_order_neither_reads_nor_releases(stage: Stage, other: str) -> None:
    token = getattr(stage, other)["token"]
    headers = {"X-Reservation-Token": token}
    for answer in (read(stage, headers), release(stage, headers), beacon(stage, token)):
        refused(answer, 404, "reservation_not_found")


def test_a_return_token_neither_reads_nor_releases(stage: Stage) -> None:
    token = stage.token(Purpose.RETURN)
    headers = {"X-Reservation-Token": token}
    for answer in (read(stage, headers), release(stage, headers), beacon(stage, token)):
        refused(answer, 404, "reservation_not_found")


def test_a_token_of_another_sale_neither_reads_nor_releases(stage: Stage) -> None:
    headers = {"X-Reservation-Token": stage.token(Purpose.RESERVATION, sale_id=stage.other_sale)}
    for answer in (read(stage, headers), release(stage, headers)):
        refused(answer, 404, "reservation_not_found")


def test_a_read_token_reads_and_does_not_release(stage: Stage) -> None:
    token = stage.token(Purpose.READ)
    headers = {"X-Reservation-Token": token}
    assert read(stage, headers).status_code == 200
    for answer in (release(stage, headers), beacon(stage, token)):
        refused(answer, 404, "reservation_not_found")


def test_the_buyers_credentials_read_the_order(stage: Stage) -> None:
    """Control: the matrix proves something only if the good ones work."""
    own = {"X-Reservation-Token": stage.token(Purpose.RESERVATION)}
    assert read(stage, own).status_code == 200
    assert read(stage, stage.buyer).status_code == 200
    assert read(stage, bearer(stage.jwt())).status_code == 200


@pytest.mark.parametrize("which", BAD_TOKENS)
def test_an_invalid_token_does_not_open_the_success_url(stage: Stage, which: str) -> None:
    token = BAD_TOKENS[which](stage, Purpose.RETURN)
    refused(open_success_url(stage, token), 403, "invalid_token")
    refused(fails(stage, token), 403, "invalid_token")


@pytest.mark.parametrize("purpose", [Purpose.RESERVATION, Purpose.READ])
def test_a_token_of_another_purpose_does_not_open_the_success_url(
    stage: Stage, purpose: Purpose
) -> None:
    token = stage.token(purpose)
    refused(open_success_url(stage, token), 403, "invalid_token")
    refused(fails(stage, token), 403, "invalid_token")


@pytest.mark.parametrize("credential", ["buyer", "admin"])
def test_a_bearer_token_does_not_replace_the_return_token(stage: Stage, credential: str) -> None:
    headers = stage.buyer if credential == "buyer" else stage.served.admin
    query = f"orderId={stage.order['orderId']}&paymentKey={stage.payment_key}&amount=1000"
    for path in (f"/v1/payments/toss/success?{query}", f"/v1/payments/toss/fail?{query}"):
        refused(stage.served.http.get(path, headers=headers), 403, "invalid_token")


@pytest.mark.parametrize("other", ["second", "theirs", "elsewhere"])
def test_a_return_token_does_not_confirm_another_order(stage: Stage, other: str) -> None:
    token = httpx.URL(getattr(stage, other)["payment"]["successUrl"]).params["token"]
    refused(open_success_url(stage, token), 403, "invalid_token")
    refused(fails(stage, token, orderId=stage.order["orderId"]), 403, "invalid_token")


@pytest.mark.parametrize(
    "changes",
    [{"amount": 1}, {"buyer": "c" * 32}, {"sale_id": "another-sale"}],
    ids=["amount", "buyer", "sale"],
)
def test_a_return_token_with_other_claims_is_refused(stage: Stage, changes: dict[str, Any]) -> None:
    """Only the service can make one; it must not pass nevertheless."""
    refused(open_success_url(stage, stage.token(Purpose.RETURN, **changes)), 403, "invalid_token")


def test_an_expired_return_token_begins_no_payment(stage: Stage) -> None:
    """It still reads the outcome of an attempt that was made, and none was."""
    past = int(time.time() * 1000) + TOKEN_LIFE_MS - 46 * 60_000
    token = stage.token(Purpose.RETURN, expires_at_ms=past)
    refused(open_success_url(stage, token), 403, "invalid_token")


def operators_calls(stage: Stage) -> dict[str, Call]:
    http = stage.served.http
    sale, order = f"/v1/admin/sales/{stage.sale_id}", f"/v1/admin/orders/{stage.order['orderId']}"
    key = {"Idempotency-Key": "rights"}
    reason = {"reason": "x"}
    stock = {"sku": "a", "delta": 1, "reason": "x"}
    refund = {"reason": "x", "restock": True}

    def posting(path: str, body: object) -> Call:
        return lambda headers: http.post(path, json=body, headers={**headers, **key})

    def getting(path: str) -> Call:
        return lambda headers: http.get(path, headers=headers)

    return {
        "put": lambda headers: http.put(
            sale, json=sale_document(), headers={**headers, "If-Match": '"v1"'}
        ),
        "create": lambda headers: http.put(
            "/v1/admin/sales/rights-new", json=sale_document(), headers=headers
        ),
        "get": getting(sale),
        "stock": posting(f"{sale}/stock", stock),
        "pause": posting(f"{sale}/pause", reason),
        "resume": posting(f"{sale}/resume", reason),
        "close": posting(f"{sale}/close", reason),
        "audit": getting(f"{sale}/audit"),
        "orders": getting("/v1/admin/orders"),
        "refunds": getting("/v1/admin/refunds"),
        "order": getting(order),
        "refund": posting(f"{order}/refund", refund),
    }


OPERATORS_CALLS = (
    "put",
    "create",
    "get",
    "stock",
    "pause",
    "resume",
    "close",
    "audit",
    "orders",
    "order",
    "refund",
    "refunds",
)
#: Bearers that are neither an operator's nor a buyer's.
NOBODIES: dict[str, Callable[[Stage], dict[str, str]]] = {
    **{name: make for name, make in BAD_BUYERS.items() if name != "the admin key"},
    "part of the key": lambda stage: bearer(stage.served.settings.admin_api_key[:-1]),
    "more than the key": lambda stage: bearer(stage.served.settings.admin_api_key + "x"),
    "a name alone": lambda _: {"X-Operator": "root"},
}


@pytest.mark.parametrize("call", OPERATORS_CALLS)
def test_operator_endpoints_require_the_admin_key(stage: Stage, call: str) -> None:
    ask = operators_calls(stage)[call]
    for who, make in NOBODIES.items():
        answer = ask(make(stage))
        assert (who, answer.status_code) == (who, 401)
        refused(answer, 401, "unauthenticated")


@pytest.mark.parametrize("call", OPERATORS_CALLS)
def test_operator_endpoints_are_forbidden_to_buyers(stage: Stage, call: str) -> None:
    ask = operators_calls(stage)[call]
    for headers in (stage.buyer, {**stage.other_buyer, "X-Operator": "root"}):
        refused(ask(headers), 403, "forbidden")


def test_the_matrix_lists_each_operator_endpoint(stage: Stage) -> None:
    assert set(operators_calls(stage)) == set(OPERATORS_CALLS)
    document = stage.served.http.get("/schema/openapi.json").json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path.startswith("/v1/admin/"):
                # Endpoints not called above have at least the same guard.
                assert operation["security"] == [{"operatorKey": []}]


def test_operator_paths_check_the_key_first(stage: Stage) -> None:
    """Covers later endpoints too: the paths come from the published document."""
    document = stage.served.http.get("/schema/openapi.json").json()
    for path, operations in document["paths"].items():
        if not path.startswith("/v1/admin/"):
            continue
        address = re.sub(r"\{\w+\}", "x", path)
        for method in operations:
            refused(stage.served.http.request(method, address), 401, "unauthenticated")
            answer = stage.served.http.request(method, address, headers=stage.buyer)
            refused(answer, 403, "forbidden")


def test_public_endpoints_need_no_credentials(stage: Stage) -> None:
    for path in ("/v1/sales", f"/v1/sales/{stage.sale_id}", "/health/live", "/health/ready"):
        assert stage.served.http.get(path).status_code == 200


def test_no_response_contains_a_secret(stage: Stage) -> None:
    settings = stage.served.settings
    secrets = (
        settings.admin_api_key,
        settings.jwt_secret,
        settings.order_id_key,
        settings.toss_secret_key,
        *settings.signing_keys,
    )
    pages = ("/", "/docs", "/v1/sales", "/health/ready", "/metrics", "/schema/openapi.json")
    for path in pages:
        text = stage.served.http.get(path).text
        assert not any(secret in text for secret in secrets)
    assert not any(secret in str(stage.served.dump(stage.sale_id)) for secret in secrets)
    log = stage.served.log.read_text(errors="replace")
    assert not any(secret in log for secret in secrets)
