"""Verification of the service's webhooks, by Standard Webhooks 1.0."""

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from typing import Any, Final, cast

from reservation.client.errors import ClientError

__all__ = ["InvalidWebhook", "verify_webhook"]

#: A webhook that is older or newer than this is refused: it may be a recorded one.
TOLERANCE_SECONDS: Final = 300
_PREFIX: Final = "whsec_"
_VERSION: Final = "v1,"


class InvalidWebhook(ClientError):
    """The request is no webhook of this endpoint: answer it with 400."""


def verify_webhook(
    secret: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    tolerance_seconds: float = TOLERANCE_SECONDS,
    now: float | None = None,
) -> dict[str, Any]:
    """The members of a webhook whose signature is valid.

    Repeats have the same `webhook-id`: store it in the transaction that handles the webhook, and
    answer a repeat with 200.

    Args:
        secret: of the endpoint, `whsec_...`.
        headers: of the request; their names in any case.
        body: of the request, as received.
        tolerance_seconds: the largest difference between its time and now.
        now: Unix seconds; by default the clock's.

    Raises:
        InvalidWebhook: a header is missing, the time is too far away, or no signature matches.
        ValueError: the secret is malformed.
    """
    given = {name.lower(): value for name, value in headers.items()}
    try:
        message_id, timestamp = given["webhook-id"], given["webhook-timestamp"]
        signatures = given["webhook-signature"].split(" ")
        seconds = int(timestamp)
    except (KeyError, ValueError) as error:
        raise InvalidWebhook("a webhook header is missing or malformed") from error
    if abs((time.time() if now is None else now) - seconds) > tolerance_seconds:
        raise InvalidWebhook("the webhook's time is too far away")
    signed = f"{message_id}.{timestamp}.".encode() + body
    expected = hmac.new(_key(secret), signed, hashlib.sha256).digest()
    if not any(_matches(signature, expected) for signature in signatures):
        raise InvalidWebhook("no signature of the webhook matches")
    try:
        members: Any = json.loads(body)
    except ValueError as error:
        raise InvalidWebhook("the webhook is not JSON") from error
    if not isinstance(members, dict):
        raise InvalidWebhook("the webhook is not a JSON object")
    return cast("dict[str, Any]", members)


def _key(secret: str) -> bytes:
    try:
        return base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except binascii.Error as error:
        raise ValueError("the secret is malformed") from error


def _matches(signature: str, expected: bytes) -> bool:
    if not signature.startswith(_VERSION):
        return False
    try:
        given = base64.b64decode(signature.removeprefix(_VERSION), validate=True)
    except (binascii.Error, ValueError):
        return False
    return hmac.compare_digest(given, expected)
