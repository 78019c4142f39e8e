"""`verify_webhook` against an independent library, and against manipulated webhooks."""

import json
from datetime import UTC, datetime

import pytest
from standardwebhooks import Webhook

from reservation.client import InvalidWebhook, verify_webhook
from reservation.domain.webhooks import new_secret, signatures

SECRET = new_secret()
BODY = json.dumps({"type": "order.confirmed", "data": {"reservation": {}}}).encode()
NOW = 1_700_000_000


def signed(secret: str = SECRET, body: bytes = BODY) -> dict[str, str]:
    signature = signatures((secret,), message_id="evt_1", timestamp=NOW, body=body)
    return {
        "Webhook-Id": "evt_1",
        "Webhook-Timestamp": str(NOW),
        "Webhook-Signature": signature,
    }


def test_a_webhook_of_the_service_is_accepted() -> None:
    assert verify_webhook(SECRET, signed(), BODY, now=NOW) == json.loads(BODY)


def test_a_webhook_signed_by_another_library_is_accepted() -> None:
    signature = Webhook(SECRET).sign("evt_1", datetime.fromtimestamp(NOW, UTC), BODY.decode())
    headers = {**signed(), "Webhook-Signature": signature}
    assert verify_webhook(SECRET, headers, BODY, now=NOW)["type"] == "order.confirmed"
    assert signed()["Webhook-Signature"] == signature


def test_one_of_several_signatures_is_enough() -> None:
    other = signed(new_secret())["Webhook-Signature"]
    headers = signed()
    headers["Webhook-Signature"] = f"v1a,AAAA {other} {headers['Webhook-Signature']}"
    assert verify_webhook(SECRET, headers, BODY, now=NOW)


@pytest.mark.parametrize(
    "change",
    [
        {"Webhook-Id": "evt_2"},
        {"Webhook-Timestamp": str(NOW + 1)},
        {"Webhook-Timestamp": "now"},
        {"Webhook-Signature": ""},
        {"Webhook-Signature": "v1,"},
        {"Webhook-Signature": "v1,not base64"},
        {"Webhook-Signature": "v1,\u00e9"},
        {"Webhook-Signature": signed(new_secret())["Webhook-Signature"]},
        {"Webhook-Signature": signed()["Webhook-Signature"].replace("v1,", "v2,")},
    ],
)
def test_a_changed_header_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(InvalidWebhook):
        verify_webhook(SECRET, signed() | change, BODY, now=NOW)


@pytest.mark.parametrize("name", ["Webhook-Id", "Webhook-Timestamp", "Webhook-Signature"])
def test_a_missing_header_is_refused(name: str) -> None:
    headers = signed()
    del headers[name]
    with pytest.raises(InvalidWebhook):
        verify_webhook(SECRET, headers, BODY, now=NOW)


def test_a_changed_body_is_refused() -> None:
    with pytest.raises(InvalidWebhook):
        verify_webhook(SECRET, signed(), BODY + b" ", now=NOW)


@pytest.mark.parametrize("seconds", [-301, 301])
def test_a_webhook_of_another_time_is_refused(seconds: int) -> None:
    with pytest.raises(InvalidWebhook):
        verify_webhook(SECRET, signed(), BODY, now=NOW + seconds)


@pytest.mark.parametrize("body", [b"[]", b"not JSON"])
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidWebhook):
        verify_webhook(SECRET, signed(body=body), body, now=NOW)


def test_a_malformed_secret_is_an_error_of_the_receiver() -> None:
    with pytest.raises(ValueError, match="secret"):
        verify_webhook("whsec_?", signed(), BODY, now=NOW)
