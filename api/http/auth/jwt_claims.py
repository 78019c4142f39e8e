"""Rules for a buyer's JWT beyond its signature: audience, issuer and times."""

from typing import Any, Final, cast

import jwt
import msgspec
from jwt.types import Options

from reservation.config.settings import Settings

__all__ = ["GUEST_AUDIENCE", "LEEWAY_SECONDS", "ClaimRules"]

#: The audience of the service's own guests, and of no other token.
GUEST_AUDIENCE: Final = "reservation-guest"
#: Allowed clock skew between the issuer and this machine.
LEEWAY_SECONDS: Final = 30


class ClaimRules(msgspec.Struct, frozen=True):
    """The required audience and issuer; None accepts any.

    `sub` and `exp` are always required; `exp` and `nbf` are checked with a leeway. `iat` and `jti`
    are not checked: they do not affect validity (RFC 7519, 4.1.6 and 4.1.7).
    """

    audience: str | None
    issuer: str | None

    @classmethod
    def of(cls, settings: Settings) -> "ClaimRules":
        """The rules of these settings."""
        if settings.auth == "guest":
            return cls(audience=GUEST_AUDIENCE, issuer=None)
        return cls(audience=settings.jwt_audience or None, issuer=settings.jwt_issuer or None)

    def allows_audience(self, audience: Any) -> bool:
        """Whether a token for this audience (text, list or None) is for this service."""
        named = cast("list[Any]", audience) if isinstance(audience, list) else [audience]
        if self.audience is None:
            # A guest token from an earlier configuration, signed with the same secret, is not
            # valid for the shop.
            return GUEST_AUDIENCE not in named
        return self.audience in named

    def decode(self, token: str, key: Any, algorithms: list[str]) -> dict[str, Any]:
        """The claims of a token that meets the rules.

        Args:
            token: in compact form.
            key: verifies the signature.
            algorithms: those allowed for the key.

        Raises:
            jwt.PyJWTError: the signature or a claim is not valid.
        """
        required = ["sub", "exp"]
        if self.audience is not None:
            required.append("aud")
        if self.issuer is not None:
            required.append("iss")
        options: Options = {
            "require": required,
            "verify_aud": self.audience is not None,
            "verify_iss": self.issuer is not None,
            "verify_iat": False,
            "verify_jti": False,
            # Checked by the caller, which can name the reason.
            "verify_sub": False,
        }
        claims = jwt.decode(
            token,
            key,
            algorithms=algorithms,
            audience=self.audience,
            issuer=self.issuer,
            leeway=LEEWAY_SECONDS,
            options=options,
        )
        if not self.allows_audience(claims.get("aud")):
            raise jwt.InvalidAudienceError("a guest token")
        return claims
