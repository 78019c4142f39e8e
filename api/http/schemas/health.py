"""Wire schema of the health checks."""

from collections.abc import Mapping, Sequence

from api.http.schemas.base import ResponseModel

__all__ = ["HealthAnswer"]


class HealthAnswer(ResponseModel, frozen=True, kw_only=True):
    """Whether the service is ready, and the missing dependencies if not."""

    status: str
    missing: Sequence[str] = ()
    #: Sales that wait for a rebuild, and the data that Redis lacks of each.
    recovering: Mapping[str, str] = {}
    #: Conditions that need attention but leave the service ready.
    warnings: Sequence[str] = ()
    #: Redis settings that cannot be read and that an operator vouches for.
    trusted: Sequence[str] = ()
