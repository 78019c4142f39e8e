"""Heads of a sale at its master, and which of them are evidence.

A master that was cut off answers as before until the observer detects its successor. A head is
evidence only if its server was still the master some time later.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import redis
from redis.exceptions import RedisError

from reservation.adapters.redis.keys import SaleKeys
from reservation.verification.model.history_format import Head
from tests.support.topologies import Node

__all__ = ["DOUBT_SECONDS", "MasterHeads", "Mastership", "certified"]

#: How often the observer queries the current master.
MASTER_SECONDS = 0.5
#: The time within which the observer detects a failover.
DOUBT_SECONDS = 20.0
OBSERVE_SECONDS_MAX = 2.0


class Mastership(msgspec.Struct):
    """The time in which the observer found one server to be the master."""

    #: The replication id of the server: a promoted one has a new one.
    replication_id: str
    first_ns: int
    last_ns: int


def certified(heads: Iterable[Head], masters: Sequence[Mastership]) -> list[Head]:
    """The heads whose server was the master for another `DOUBT_SECONDS`.

    The newest server is included: the observer may have stopped before it detected more.
    """
    doubt_ns = int(DOUBT_SECONDS * 1e9)
    sure = [(one.first_ns, one.last_ns - doubt_ns) for one in masters]
    return [
        head
        for head in heads
        if any(first_ns <= head.invoked_ns <= last_ns for first_ns, last_ns in sure)
    ]


class MasterHeads:
    """Polls of a sale at its master.

    Args:
        sale_id: the sale.
        keys: its keys.
        skus: its items.
        find: the current master; raises RedisError if none is known.
        masters: receives the servers found to be the master.
    """

    def __init__(
        self,
        sale_id: str,
        keys: SaleKeys,
        skus: Iterable[str],
        find: Callable[[], Node],
        masters: list[Mastership],
    ) -> None:
        self._sale_id = sale_id
        self._keys = keys
        self._skus = list(skus)
        self._find = find
        self._masters = masters
        self._redis: Any = None
        self._port = 0
        self._asked_at = 0.0

    def observe(self) -> Head:
        """The current head of the sale.

        Raises:
            redis.RedisError: the head cannot be read, or the server is not a master.
        """
        client = self._client()
        invoked_ns = time.monotonic_ns()
        try:
            with client.pipeline(transaction=True) as together:
                together.info("replication")
                together.hget(self._keys.sale, "seq")
                for sku in self._skus:
                    together.hmget(self._keys.stock(sku), "total", "available", "held", "sold")
                facts, seq, *rows = together.execute()
        except RedisError:
            self._asked_at = 0.0
            raise
        if facts["role"] != "master":
            self._asked_at = 0.0
            raise redis.ConnectionError("the server is a replica")
        self._note(facts["master_replid"], invoked_ns)
        counted = [
            (int(total), int(available), int(held), int(sold))
            for total, available, held, sold in rows
            if None not in (total, available, held, sold)
        ]
        return Head(
            sale=self._sale_id,
            invoked_ns=invoked_ns,
            answered_ns=time.monotonic_ns(),
            seq=int(seq or 0),
            stock=dict(zip(self._skus, counted, strict=False)),
        )

    def _note(self, replication_id: str, at_ns: int) -> None:
        if self._masters and self._masters[-1].replication_id == replication_id:
            self._masters[-1].last_ns = at_ns
        else:
            self._masters.append(Mastership(replication_id, at_ns, at_ns))

    def _client(self) -> Any:
        now = time.monotonic()
        if self._redis is None or now - self._asked_at > MASTER_SECONDS:
            node = self._find()
            self._asked_at = now
            if node.port != self._port:
                self.close()
                self._port = node.port
                self._redis = node.client(
                    socket_timeout=OBSERVE_SECONDS_MAX, socket_connect_timeout=OBSERVE_SECONDS_MAX
                )
        return self._redis

    def close(self) -> None:
        if self._redis is not None:
            self._redis.close()
            self._redis = None
