"""Resolves the address of Redis for each new connection: a fixed one, or a master by Sentinel."""

import asyncio
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol, cast

import msgspec
import structlog
from redis.asyncio import Connection, ConnectionPool, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from reservation.adapters.redis.errors import AddressUnfit, cause_of
from reservation.config.redis_address import (
    AddressKind,
    HostPort,
    RedisAddress,
    parse_redis_url,
)

__all__ = [
    "CONNECT_TIMEOUT_SECONDS",
    "WAIT_SECONDS_MAX",
    "Addresses",
    "Endpoint",
    "FixedAddress",
    "MasterOfSentinels",
    "ServersOfCluster",
    "addresses_of",
]

log = structlog.get_logger(__name__)

#: How long a call may wait for a connection. A script that reaches the server later than this does
#: nothing. A slow script takes 20 ms, and a buyer waits longer than this.
WAIT_SECONDS_MAX: Final = 2.0
CONNECT_TIMEOUT_SECONDS: Final = 2.0
#: Time-out of a sentinel's answer, including the handshake.
SENTINEL_SECONDS_MAX: Final = 1.5
#: How long the other sentinels may answer after the first answer, unless a majority agrees.
SENTINEL_GRACE_SECONDS: Final = 0.3

#: Pause between two reads of the replicas' priorities.
PRIORITIES_SECONDS: Final = 60.0

#: Called on a new connection instead of redis-py's own handshake.
Handshake = Callable[[Any], Awaitable[None]]


def _tcp_options() -> dict[int, int]:
    # A lost host sends no RST. Bytes not acknowledged by a script's `not_after` are useless, so the
    # kernel drops the connection then (TCP_USER_TIMEOUT).
    options = {
        "TCP_USER_TIMEOUT": int(WAIT_SECONDS_MAX * 1000),
        "TCP_KEEPIDLE": 15,
        "TCP_KEEPINTVL": 5,
    }
    return {
        getattr(socket, name): value for name, value in options.items() if hasattr(socket, name)
    }


def _common_options() -> dict[str, Any]:
    return {
        # With RESP3 a server may push messages.
        "protocol": 2,
        "decode_responses": True,
        # Damaged bytes must be named in an error, not break the reader.
        "encoding_errors": "backslashreplace",
        # Our own time-outs cover the whole handshake and each exchange.
        "socket_timeout": None,
        "socket_connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
    }


class Endpoint(msgspec.Struct, frozen=True):
    """One server, and how to connect to it."""

    connection_class: type[Any]
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its address, for messages."""
        path = self.options.get("path")
        return path or f"{self.options.get('host')}:{self.options.get('port')}"

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine."""
        return "path" in self.options or self.options.get("host") in (
            "127.0.0.1",
            "::1",
            "localhost",
        )

    @property
    def client_retries(self) -> int:
        """Automatic retries of the client library: none."""
        return cast("Retry", self.options["retry"]).get_retries()

    def make_connection(self, handshake: Handshake | None = None) -> Any:
        """redis-py's connection, not connected yet."""
        return self.connection_class(**self.options, redis_connect_func=handshake)


class Addresses(Protocol):
    """The servers to which a new connection may be opened."""

    #: Whether a server that reports itself as a replica must not be used.
    masters_only: bool

    async def endpoints(self) -> Sequence[Endpoint]:
        """The servers to try, the best first.

        Raises:
            RedisConnectionError: no server is known at present.
            AddressUnfit: the setting is wrong, so that a retry would not succeed.
        """
        ...

    async def replica_priorities(self) -> tuple[int, ...] | None:
        """The replicas' priorities in an election; None if unknown, empty without sentinels."""
        ...

    @property
    def client_retries(self) -> int: ...

    @property
    def is_unix_socket(self) -> bool: ...


class FixedAddress:
    """One server; its host name is resolved for each connection."""

    masters_only = False

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    async def endpoints(self) -> Sequence[Endpoint]:
        """The server."""
        return (self._endpoint,)

    async def replica_priorities(self) -> tuple[int, ...] | None:
        """Empty: without sentinels there is no election."""
        return ()

    @property
    def client_retries(self) -> int:
        """Automatic retries of the client library: none."""
        return self._endpoint.client_retries

    @property
    def is_unix_socket(self) -> bool:
        """Whether the server listens on a unix socket, whose directory controls the access."""
        return "path" in self._endpoint.options


class ServersOfCluster:
    """The servers that a cluster's address names; any of them lists the others."""

    masters_only = False

    def __init__(self, address: RedisAddress) -> None:
        self._endpoints = tuple(endpoint_at(host, address) for host in address.hosts)

    async def endpoints(self) -> Sequence[Endpoint]:
        """All servers of the address."""
        return self._endpoints

    async def replica_priorities(self) -> tuple[int, ...] | None:
        """Empty: elections of a cluster ignore priorities."""
        return ()

    @property
    def client_retries(self) -> int:
        """Automatic retries of the client library: none."""
        return self._endpoints[0].client_retries

    @property
    def is_unix_socket(self) -> bool:
        """Never: a cluster's servers listen on TCP."""
        return False


class _Answer(msgspec.Struct, frozen=True):
    """One sentinel's answer."""

    master: HostPort
    #: Increases with each failover that the sentinel has seen.
    config_epoch: int


class MasterOfSentinels:
    """The master of a service, by the answers of its sentinels.

    All sentinels are queried at once. An isolated sentinel still names the old master, so the
    answer with the latest failover is used, or the most frequent one among several. A server that
    reports itself as a replica is skipped.
    """

    masters_only = True

    def __init__(self, address: RedisAddress) -> None:
        self._address = address
        self._asking: asyncio.Task[list[HostPort]] | None = None
        #: The replicas' priorities as read last, and when.
        self._priorities: tuple[int, ...] | None = None
        self._priorities_at = float("-inf")

    async def endpoints(self) -> Sequence[Endpoint]:
        """The master first, then the other servers that sentinels named."""
        # Connections opened concurrently share one query.
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
            # Retrieves its error even if every caller was cancelled.
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        masters = await asyncio.shield(self._asking)
        return [endpoint_at(master, self._address) for master in masters]

    @property
    def client_retries(self) -> int:
        """Automatic retries of the client library: none."""
        return endpoint_at(self._address.hosts[0], self._address).client_retries

    @property
    def is_unix_socket(self) -> bool:
        """Never: sentinels name TCP addresses."""
        return False

    async def replica_priorities(self) -> tuple[int, ...] | None:
        """The replicas' priorities, as one sentinel has them; read again after a minute."""
        now = asyncio.get_running_loop().time()
        if now - self._priorities_at < PRIORITIES_SECONDS:
            return self._priorities
        self._priorities_at = now
        try:
            async with asyncio.timeout(SENTINEL_GRACE_SECONDS):
                self._priorities = await self._read_priorities()
        except (RedisError, OSError) as error:
            log.debug("priorities_unread", reason=cause_of(error))
            self._priorities = None
        return self._priorities

    async def _read_priorities(self) -> tuple[int, ...]:
        failure: RedisError | OSError = RedisConnectionError("no sentinel answers")
        for host in self._address.hosts:
            connection = _sentinel_at(host, self._address).make_connection()
            try:
                await connection.connect()
                await connection.send_command("SENTINEL", "REPLICAS", self._address.service)
                found = await connection.read_response()
            except (RedisError, OSError) as error:
                failure = error
            else:
                replicas = [dict(zip(flat[::2], flat[1::2], strict=True)) for flat in found]
                return tuple(int(one.get("slave-priority", 0)) for one in replicas)
            finally:
                await connection.disconnect(nowait=True)
        raise failure

    async def _ask(self) -> list[HostPort]:
        hosts = self._address.hosts
        tasks = {asyncio.create_task(self._ask_one(host)): host for host in hosts}
        try:
            answers = await self._gathered(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not answers:
            raise _no_answer(self._address.service, tasks)
        votes = Counter(answer.master for answer in answers)
        best = sorted(answers, key=lambda one: (-one.config_epoch, -votes[one.master]))
        return list(dict.fromkeys(answer.master for answer in best))

    async def _gathered(self, tasks: Mapping[asyncio.Task[_Answer], HostPort]) -> list[_Answer]:
        """The answers, up to a majority that agrees; otherwise all that arrive in time."""
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + SENTINEL_SECONDS_MAX
        pending = set(tasks)
        answers: list[_Answer] = []
        while pending and (wait := give_up_at - loop.time()) > 0:
            done, pending = await asyncio.wait(
                pending, timeout=wait, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                if task.exception() is None:
                    answers.append(task.result())
            if any(answers.count(answer) * 2 > len(tasks) for answer in answers):
                break
            if answers:
                give_up_at = min(give_up_at, loop.time() + SENTINEL_GRACE_SECONDS)
        return answers

    async def _ask_one(self, host: HostPort) -> _Answer:
        connection = _sentinel_at(host, self._address).make_connection()
        try:
            await connection.connect()
            service = self._address.service
            await connection.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
            found = await connection.read_response()
            if found is None:
                raise AddressUnfit(f"the sentinel monitors no master named {service}")
            await connection.send_command("SENTINEL", "MASTER", service)
            flat = await connection.read_response()
            facts = dict(zip(flat[::2], flat[1::2], strict=True))
            return _Answer((found[0], int(found[1])), int(facts.get("config-epoch", 0)))
        finally:
            await connection.disconnect(nowait=True)


def _no_answer(
    service: str, tasks: Mapping[asyncio.Task[_Answer], HostPort]
) -> RedisConnectionError | AddressUnfit:
    """The error to raise if no sentinel named a master."""
    errors = {host: None if task.cancelled() else task.exception() for task, host in tasks.items()}
    if all(isinstance(error, AddressUnfit) for error in errors.values()):
        return AddressUnfit(f"no sentinel monitors a master named {service}")
    causes = [
        f"{host}:{port}: {'no answer in time' if error is None else cause_of(error)}"
        for (host, port), error in errors.items()
    ]
    if all(isinstance(error, ResponseError | AuthenticationError) for error in errors.values()):
        return AddressUnfit(f"no sentinel answers: {'; '.join(causes)}")
    return RedisConnectionError(f"no sentinel names a master: {'; '.join(causes)}")


def endpoint_at(host: HostPort, address: RedisAddress) -> Endpoint:
    """A server of this address."""
    return _endpoint(
        host,
        tls=address.tls,
        username=address.username,
        password=address.password,
        db=address.database,
    )


def _sentinel_at(host: HostPort, address: RedisAddress) -> Endpoint:
    return _endpoint(
        host,
        tls=address.tls,
        username=address.sentinel_username,
        password=address.sentinel_password,
    )


def _endpoint(host: HostPort, *, tls: Mapping[str, str] | None, **options: Any) -> Endpoint:
    given = {name: value for name, value in options.items() if value is not None}
    return Endpoint(
        Connection if tls is None else SSLConnection,
        {
            **_common_options(),
            "socket_keepalive": True,
            "socket_keepalive_options": _tcp_options(),
            "host": host[0],
            "port": host[1],
            **(tls or {}),
            **given,
        },
    )


def _endpoint_of_url(url: str) -> Endpoint:
    tcp = (
        {}
        if url.startswith("unix:")
        else {
            "socket_keepalive": True,
            "socket_keepalive_options": _tcp_options(),
        }
    )
    #: Parses the URL; it pools no connection.
    parsed = ConnectionPool.from_url(url, **_common_options(), **tcp)  # pyright: ignore[reportUnknownMemberType]
    # Overrides the URL.
    return Endpoint(parsed.connection_class, {**parsed.connection_kwargs, "protocol": 2})


def addresses_of(url: str) -> Addresses:
    """The servers of this address."""
    address = parse_redis_url(url)
    if address.kind is AddressKind.SENTINEL:
        return MasterOfSentinels(address)
    if address.kind is AddressKind.CLUSTER:
        return ServersOfCluster(address)
    return FixedAddress(_endpoint_of_url(url))
