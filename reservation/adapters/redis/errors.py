"""What the server's replies mean: what was refused, what may have happened, what is a bug."""

from typing import Any, Final

from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from reservation.domain.errors import BrokenInvariant

__all__ = [
    "NotPermitted",
    "StoreUnavailable",
    "StoreUncertain",
    "UnexpectedReply",
    "good",
    "is_replica",
    "life_of",
    "run_id_of",
    "told",
]

#: Other replies by which the server refuses a command before it runs begin like this.
_REFUSAL_CODES: Final = ("BUSY ", "MISCONF ", "NOREPLICAS ", "OOM ", "READONLY ", "LOADING ")


class StoreUnavailable(Exception):
    """Redis cannot be asked now, and it is certain that this call changed nothing."""


class NotPermitted(StoreUnavailable):
    """The server's rules do not let our user do this."""


class StoreUncertain(Exception):
    """The call was sent and its reply was lost: it may or may not have happened."""


class UnexpectedReply(BrokenInvariant):
    """An error reply that no healthy server and no correct script gives."""


def told(answer: Any) -> Any:
    """What came for a command; what an error reply means, as an exception that is not raised.

    Raises:
        ConnectionError: redis-py's, where the server speaks of the connection.
    """
    if not isinstance(answer, Exception):
        return answer
    match answer:
        case NoScriptError():
            return answer
        case NoPermissionError():
            return NotPermitted(f"not permitted: {answer}")
        # Before what speaks of the connection: redis-py counts the first of these among it.
        case (
            BusyLoadingError()
            | ClusterDownError()
            | MasterDownError()
            | OutOfMemoryError()
            | ReadOnlyError()
        ):
            return StoreUnavailable(f"{type(answer).__name__}: {answer}")
        case RedisConnectionError():
            raise answer
        case ResponseError() if str(answer).startswith(_REFUSAL_CODES):
            return StoreUnavailable(str(answer))
        case _:
            # Anything else comes from a script's own check, which changed nothing, or from a hand
            # in the data: neither may be lived with.
            return UnexpectedReply(str(answer))


def run_id_of(info: str) -> str:
    """The run id in INFO's answer; empty where the server does not tell."""
    return _member(info, "run_id")


def life_of(info: str) -> str:
    """Which life of which server gave this INFO (sections server and replication).

    A start gives a server another run id, a promotion gives its data another replication id: a
    server that was demoted and promoted again under one run id may have lost changes.
    """
    return f"{run_id_of(info)}/{_member(info, 'master_replid')}"


def is_replica(info: str) -> bool:
    """Whether the server of this INFO (section replication) follows another one."""
    return _member(info, "role") in ("slave", "replica")


def _member(info: str, name: str) -> str:
    for line in info.splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    return ""


def good(reply: Any) -> Any:
    """A pipeline's reply, raised where it is an error."""
    if isinstance(reply, Exception):
        raise reply
    return reply
