"""Our own tokens: the holder's rights to one reservation, proven by an HMAC.

    reservation  read and release this reservation (`X-Reservation-Token`)
    return       bring this buyer back from the payment page; it can neither read nor release
    read         read the outcome in another browser than the one that paid

A token is `v1.KEYID.PAYLOAD.MAC`: the payload is a JSON array in base64url, the MAC covers
everything before it, with its own key for each purpose. The sale's admission is an HMAC of
the same keys over the content of its page, and the buyer who was shown it.
"""

import hmac
from base64 import urlsafe_b64decode
from collections.abc import Sequence
from enum import StrEnum
from typing import Final

import msgspec

from reservation.domain import base64url
from reservation.domain.errors import InvalidToken
from reservation.domain.hmac_sha256 import Mac

__all__ = ["Claims", "Page", "Purpose", "Signer"]

_VERSION: Final = "v1"
#: Longer than any token we make (a payload is under 300 bytes): not worth decoding.
_TOKEN_CHARS_MAX: Final = 1024
_KEY_ID_CHARS: Final = 8
_MAC_BYTES: Final = 32
_ENCODER: Final = msgspec.json.Encoder()
#: Placeholders of the ids in the template of similar tokens: no id has braces.
_ORDER: Final = "{order}"
_BUYER: Final = "{buyer}"

_MINUTE_MS: Final = 60_000
_DAY_MS: Final = 86_400_000
#: How long after the deadline a buyer may still come back to claim: the PG's own page lives 30
#: minutes and its authentication 10 more, and clocks differ.
RETURN_CLAIM_MS: Final = 45 * _MINUTE_MS
#: How long the outcome of an attempt can be read with the token that began it.
TOKEN_LIFE_MS: Final = 30 * _DAY_MS
#: How long the read token in a result page's URL lives.
READ_LIFE_MS: Final = 60 * _MINUTE_MS
#: How long a page may be open before its admission must be fetched again.
ADMISSION_MINUTES: Final = 10


class Purpose(StrEnum):
    """The purpose of a token; no token has two."""

    RESERVATION = "reservation"
    RETURN = "return"
    READ = "read"


class Claims(msgspec.Struct, frozen=True, array_like=True):
    """The content of a token. `buyer` is the PG's customer key: no buyer id is put into a URL."""

    purpose: str
    sale_id: str
    order_id: str
    buyer: str
    amount: int
    expires_at_ms: int
    #: The position of Redis when the token was made: an order that is missing then was lost.
    epoch: str
    seq: int

    def may_claim(self, now_ms: int) -> bool:
        """Whether a return token may still begin a payment attempt."""
        return now_ms <= self.expires_at_ms - TOKEN_LIFE_MS + RETURN_CLAIM_MS


class Page(msgspec.Struct, frozen=True):
    """The subject of an admission: the sale's page as it was shown."""

    sale_id: str
    #: Every item with its price.
    prices: str
    opens_at_ms: int


class Signer:
    """Signs with the first key and verifies with all of them.

    Args:
        keys: secrets; the first signs. Each has an id from its own hash, so verification does not
            depend on their order.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._macs: dict[tuple[str, str], Mac] = {}
        ids: list[str] = []
        for key in keys:
            secret = key.encode()
            key_id = hmac.digest(secret, b"key-id", "sha256").hex()[:_KEY_ID_CHARS]
            ids.append(key_id)
            for purpose in (*Purpose, "admission"):
                derived = hmac.digest(secret, b"purpose\0" + purpose.encode(), "sha256")
                self._macs[key_id, str(purpose)] = Mac(derived)
        self._key_ids = tuple(ids)
        self._begin = f"{_VERSION}.{ids[0]}."
        self._signing = {purpose.value: self._macs[ids[0], purpose.value] for purpose in Purpose}

    def sign(self, claims: Claims) -> str:
        """Sign these claims."""
        payload = base64url.encode(_ENCODER.encode(claims))
        body = f"{self._begin}{payload}"
        mac = self._signing[claims.purpose]
        return f"{body}.{base64url.encode(mac.digest(body.encode()))}"

    def batch_signer(self, claims: Claims) -> "BatchSigner":
        """A signer of tokens with the same claims but for the order, the buyer and the number."""
        return BatchSigner(self._begin.encode(), self._signing[claims.purpose], claims)

    def verify(self, token: str, purpose: Purpose, *, now_ms: int) -> Claims:
        """The claims of a token that is ours, for this purpose and not expired.

        Raises:
            InvalidToken: in every other case, without the reason.
        """
        parts = token.split(".") if len(token) <= _TOKEN_CHARS_MAX and token.isascii() else []
        if len(parts) != 4 or parts[0] != _VERSION:
            raise InvalidToken
        known_mac = self._macs.get((parts[1], purpose))
        mac = _decode(parts[3])
        if known_mac is None or mac is None or len(mac) != _MAC_BYTES:
            raise InvalidToken
        body = f"{parts[0]}.{parts[1]}.{parts[2]}"
        if not hmac.compare_digest(known_mac.digest(body.encode()), mac):
            raise InvalidToken
        claims = _claims(parts[2])
        if claims is None or claims.purpose != purpose or now_ms > claims.expires_at_ms:
            raise InvalidToken
        return claims

    def admission(self, page: "Page", buyer_id: str, *, now_ms: int) -> str:
        """The admission for this buyer from the page of an open sale: good for ten minutes."""
        minute = now_ms // _MINUTE_MS
        mac = self._admission_mac(self._key_ids[0], page, buyer_id, minute)
        return f"{self._key_ids[0]}.{minute}.{base64url.encode(mac)}"

    def admits(self, admission: str, page: "Page", buyer_id: str, *, now_ms: int) -> bool:
        """Whether this page issued this admission, recently, to this buyer.

        One from before the opening is invalid: bots would collect it the day before.
        """
        key_id, _, rest = admission.partition(".")
        minute_text, _, mac_text = rest.partition(".")
        mac = _decode(mac_text) if len(admission) <= _TOKEN_CHARS_MAX else None
        if key_id not in self._key_ids or not minute_text.isdecimal() or mac is None:
            return False
        minute = int(minute_text) if len(minute_text) < 12 else 0
        age = now_ms // _MINUTE_MS - minute
        if not -1 <= age <= ADMISSION_MINUTES or minute < page.opens_at_ms // _MINUTE_MS:
            return False
        return hmac.compare_digest(self._admission_mac(key_id, page, buyer_id, minute), mac)

    def _admission_mac(self, key_id: str, page: "Page", buyer_id: str, minute: int) -> bytes:
        message = msgspec.json.encode(
            [page.sale_id, page.prices, page.opens_at_ms, buyer_id, minute]
        )
        return self._macs[key_id, "admission"].digest(message)


class BatchSigner:
    """Tokens of one purpose, for orders that were made together: `Signer.sign`, at half the cost.

    Args:
        begin: the common prefix.
        mac: of the purpose.
        claims: of any of them.
    """

    __slots__ = ("_before", "_begin", "_between", "_digest")

    def __init__(self, begin: bytes, mac: Mac, claims: Claims) -> None:
        marked = msgspec.structs.replace(claims, order_id=_ORDER, buyer=_BUYER, seq=0)
        text = _ENCODER.encode(marked).decode()
        self._before, rest = text.split(f'"{_ORDER}","{_BUYER}"')
        # The number is the last of the claims.
        self._between = rest.removesuffix("0]")
        self._begin = begin
        self._digest = mac.digest

    def sign(self, order_id: str, buyer: str, seq: int) -> bytes:
        """The token of one order; the ids must be ours, which need no JSON escaping."""
        payload = f'{self._before}"{order_id}","{buyer}"{self._between}{seq}]'.encode()
        body = self._begin + base64url.encoded(payload)
        return b"%b.%b" % (body, base64url.encoded(self._digest(body)))


def _decode(text: str) -> bytes | None:
    try:
        data = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        return None
    # One spelling only: base64 ignores stray bits, and a token must not have two forms.
    return data if base64url.encode(data) == text else None


def _claims(payload: str) -> Claims | None:
    data = _decode(payload)
    if data is None:
        return None
    try:
        return msgspec.json.decode(data, type=Claims)
    except msgspec.MsgspecError:
        return None
