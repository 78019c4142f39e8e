"""Errors of Redis: refused, outcome unknown, or a bug."""

import os
import re
import ssl
from typing import Any, Final

from redis.exceptions import (
    AuthenticationError,
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
from redis.exceptions import TimeoutError as RedisTimeoutError

from reservation.domain.errors import BrokenInvariant

__all__ = [
    "AddressUnfit",
    "NotAcknowledged",
    "NotPermitted",
    "StoreUnavailable",
    "StoreUncertain",
    "TooFewReplicas",
    "UnexpectedReply",
    "as_reply",
    "cause_of",
    "is_replica",
    "life_of",
    "online_replicas_in",
    "run_id_of",
    "unwrap",
]

#: Prefixes of other error replies that refuse a command before it runs.
_REFUSAL_CODES: Final = ("BUSY ", "MISCONF ", "NOREPLICAS ", "OOM ", "READONLY ", "LOADING ")


class StoreUnavailable(Exception):
    """Redis is unavailable, and this call certainly changed nothing."""


class AddressUnfit(StoreUnavailable):
    """The address of Redis is wrong, or its server refuses our user; a retry would not succeed."""


class NotPermitted(StoreUnavailable):
    """The server's ACL denies our user this command."""


class TooFewReplicas(StoreUnavailable):
    """Too few replicas acknowledge changes: the call was not sent."""


class StoreUncertain(Exception):
    """The call was sent and its reply was lost: it may or may not have happened."""


class NotAcknowledged(StoreUncertain):
    """The call ran, and too few replicas acknowledged it: a failover may lose it.

    Args:
        reply: of the call.
    """

    def __init__(self, reply: Any) -> None:
        super().__init__("too few replicas acknowledged the change")
        self.reply = reply


class UnexpectedReply(BrokenInvariant):
    """An error reply that a healthy server and a correct script never give."""


def as_reply(answer: Any) -> Any:
    """A command's reply; an error reply becomes an exception, which is returned.

    Raises:
        ConnectionError: redis-py's, where the error concerns the connection.
    """
    if not isinstance(answer, Exception):
        return answer
    match answer:
        case NoScriptError():
            return answer
        case NoPermissionError():
            return NotPermitted(f"not permitted: {answer}")
        # Before the connection errors: redis-py counts the first of these among them.
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
            # Any other error comes from a check of a script, which changed nothing, or from a
            # manual edit of the data. Both are bugs.
            return UnexpectedReply(str(answer))


def run_id_of(info: str) -> str:
    """The run id in INFO's reply; empty if the server hides it."""
    return _member(info, "run_id")


def life_of(info: str) -> str:
    """The server's life: its run id and replication id, from INFO server and replication.

    A restart changes the run id, a promotion the replication id: a server that was demoted and
    promoted again under one run id may have lost changes.
    """
    return f"{run_id_of(info)}/{_member(info, 'master_replid')}"


def is_replica(info: str) -> bool:
    """Whether the server of this INFO (section replication) is a replica."""
    return _member(info, "role") in ("slave", "replica")


#: A line of INFO about a replica that has the server's data.
_ONLINE_REPLICA: Final = re.compile(r"^slave\d+:.*\bstate=online\b", re.MULTILINE)


def online_replicas_in(info: str) -> int:
    """The replicas that this INFO (section replication) lists as online."""
    return len(_ONLINE_REPLICA.findall(info))


def _member(info: str, name: str) -> str:
    for line in info.splitlines():
        if line.startswith(f"{name}:"):
            return line.partition(":")[2].strip()
    return ""


def unwrap(reply: Any) -> Any:
    """A pipeline's reply; raises it where it is an error."""
    if isinstance(reply, Exception):
        raise reply
    return reply


def cause_of(error: BaseException) -> str:
    """The server's error reply, or the connection error."""
    if isinstance(error, AuthenticationError | StoreUnavailable):
        return str(error)
    if isinstance(error, ResponseError):
        return str(error)
    if isinstance(error, TimeoutError | RedisTimeoutError):
        return "no answer in time"
    # The library's own text of a refused connection is an errno in a tuple.
    inner = error.__cause__ or error.__context__ or error
    if isinstance(inner, OSError) and not isinstance(inner, ssl.SSLError) and inner.errno:
        return inner.strerror if inner.errno < 0 and inner.strerror else os.strerror(inner.errno)
    return str(inner) or type(inner).__name__
