"""The rules of settings in production and staging: required ones, and unsafe values."""

from collections.abc import Mapping
from typing import Any, Final

from reservation.config.gateway_keys import is_toss
from reservation.config.parsing import SettingsError, refusal, variable_of

__all__ = ["GENERATED_SECRETS", "refuse_missing", "refuse_unsafe", "required_in_production"]

#: Shortest secret: 256 bits if random, as HMAC-SHA256 requires (RFC 2104, 3).
_SECRET_BYTES_MIN: Final = 32

#: Secrets that are generated at first start where allowed.
GENERATED_SECRETS: Final = ("admin_api_key", "signing_keys", "order_id_key", "jwt_secret")


def required_in_production(given: Mapping[str, str]) -> list[str]:
    """The settings without a default there, by field name."""
    required = [
        "auth",
        "admin_api_key",
        "signing_keys",
        "order_id_key",
        "jwt_secret",
        "toss_api_url",
        "toss_secret_key",
        "toss_client_key",
        "public_url",
    ]
    if given.get("auth") == "jwt" and "jwks_url" in given:
        required.remove("jwt_secret")
    return required


def refuse_missing(given: Mapping[str, str], required: list[str], where: str) -> None:
    """Raises `SettingsError`, naming every required setting that is not given."""
    if missing := [variable_of(name) for name in required if name not in given]:
        raise SettingsError(f"{', '.join(missing)} must be given {where}")


def refuse_unsafe(values: Mapping[str, Any]) -> None:
    """Raises `SettingsError` for the first value, by field name, that is unsafe there."""
    for name in ("public_url", "toss_api_url", "storefront_url", "jwks_url", "toss_checkout_url"):
        address: str = values[name]
        if address and not address.startswith("https://"):
            raise refusal(name, f"an https:// address in {values['env']}")
    if not is_toss(values["toss_api_url"]):
        raise refusal("toss_api_url", f"https://api.tosspayments.com in {values['env']}")
    if values["env"] == "production":
        for name in ("toss_secret_key", "toss_client_key"):
            if not values[name].startswith("live_"):
                raise refusal(name, "a live_ key in production")
    for name in GENERATED_SECRETS:
        value: str | tuple[str, ...] = values[name]
        keys = (value,) if isinstance(value, str) else value
        if any(len(key.encode()) < _SECRET_BYTES_MIN for key in keys if key):
            raise refusal(name, f"at least {_SECRET_BYTES_MIN} bytes in {values['env']}")
