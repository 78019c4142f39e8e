"""Webhooks to shops: secrets and signatures by Standard Webhooks 1.0, and the retry schedule."""

import base64
import hashlib
import hmac
import secrets
from typing import Final

import msgspec

__all__ = ["RETRIES", "RetrySchedule", "new_secret", "signatures"]

_PREFIX: Final = "whsec_"
#: Standard Webhooks allows 24 to 64 bytes.
_SECRET_BYTES: Final = 32
_MINUTE: Final = 60.0
_HOUR: Final = 3_600.0


class RetrySchedule(msgspec.Struct, frozen=True):
    """The pauses between attempts, in seconds; after the last one a delivery has failed."""

    pauses: tuple[float, ...]
    #: A pause is multiplied by a random factor between 1 minus and 1 plus this.
    jitter: float = 0.2

    def pause(self, attempts: int, random: float) -> float | None:
        """The pause after this many failed attempts; None if there is no further one.

        Args:
            attempts: at least 1.
            random: in [0, 1).
        """
        if attempts > len(self.pauses):
            return None
        return self.pauses[attempts - 1] * (1 + self.jitter * (2 * random - 1))

    def scaled(self, factor: float) -> "RetrySchedule":
        """The schedule with all pauses multiplied by this factor."""
        return RetrySchedule(tuple(pause * factor for pause in self.pauses), self.jitter)


#: About three days.
RETRIES: Final = RetrySchedule(
    (
        5.0,
        30.0,
        2 * _MINUTE,
        10 * _MINUTE,
        30 * _MINUTE,
        _HOUR,
        2 * _HOUR,
        4 * _HOUR,
        8 * _HOUR,
        12 * _HOUR,
        12 * _HOUR,
        12 * _HOUR,
        20 * _HOUR,
    )
)


def new_secret() -> str:
    """A random secret: `whsec_` and base64."""
    return _PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def signatures(keys: tuple[str, ...], *, message_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature`: one signature per secret, separated by spaces."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return " ".join(f"v1,{_sign(key, signed)}" for key in keys)


def _sign(secret: str, signed: bytes) -> str:
    key = base64.b64decode(secret.removeprefix(_PREFIX))
    return base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
