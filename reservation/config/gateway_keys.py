"""Checks that the payment gateway's keys are a pair that fits the environment."""

import re
from typing import Final
from urllib.parse import urlsplit

from reservation.config.parsing import refusal, variable_of

__all__ = ["SANDBOX_CLIENT_KEY", "SANDBOX_SECRET_KEY", "check_toss_keys", "is_toss"]

#: The key pair of the built-in sandbox. Public, so production refuses it.
SANDBOX_CLIENT_KEY: Final = "test_gck_sandbox"
SANDBOX_SECRET_KEY: Final = "test_gsk_sandbox"  # noqa: S105 - valid only for the sandbox

#: The PG's own domain: the only place that a live key is sent to.
_TOSS_DOMAIN: Final = "tosspayments.com"
_TOSS_KEY = re.compile(r"(test|live)_(g?)([cs])k_.+")


def check_toss_keys(*, secret_key: str, client_key: str, api_url: str, production: bool) -> None:
    """Refuse mismatched keys at start: the PG would refuse them only at the first payment.

    Raises:
        SettingsError: naming the wrong setting.
    """
    secret, client = _TOSS_KEY.fullmatch(secret_key), _TOSS_KEY.fullmatch(client_key)
    if secret is not None and secret[1] == "live" and not production:
        raise refusal("toss_secret_key", "a test_ key outside production (RESERVATION_ENV)")
    if not (production or is_toss(api_url)):
        return  # The sandbox takes any pair.
    if secret_key == SANDBOX_SECRET_KEY:
        raise refusal("toss_secret_key", "your own key when the PG is the real one")
    if secret is None or secret[3] != "s":
        raise refusal("toss_secret_key", "a secret key: test_sk_, test_gsk_, live_sk_, live_gsk_")
    if client is None or client[3] != "c":
        raise refusal("toss_client_key", "a client key: test_ck_, test_gck_, live_ck_, live_gck_")
    if (secret[1], secret[2]) != (client[1], client[2]):
        raise refusal("toss_client_key", f"the pair of {variable_of('toss_secret_key')}")


def is_toss(address: str) -> bool:
    """Whether the address is one of the PG's own."""
    host = urlsplit(address).hostname or ""
    return host == _TOSS_DOMAIN or host.endswith("." + _TOSS_DOMAIN)
