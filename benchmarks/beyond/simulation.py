"""Simulation of a sale's prepares on many machines, in virtual time.

The components follow the service's rules. An API process runs one turn of its loop at a time,
queues baskets by partition, sends one call per partition at a time, and sheds load when a queue is
too long. A Redis server runs all pending calls, syncs its file once for all of them, and replies.

    buyers --> API process: turn --> queue of a partition --> call --> Redis server: scripts, sync
       ^                                                                        |
       +------ 201, 409 sold_out, or 503 with a retry <-------------------------+

Each API process and each Redis server has a core of its own. A seed draws the buyers' arrival,
their partitions and their processes. Not simulated: transfers of stock between partitions (each has
an equal share), payments, and background work.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from reservation.adapters.redis.prepare_queue import (
    BASKETS_MAX,
    BATCHES_WAITING_MIN,
    LAST_BATCH_SHARE,
    WAITING_SECONDS_MAX,
)

__all__ = ["Costs", "Crowd", "Fleet", "Outcome", "simulate"]

#: Share of a hold's CPU time in the API that is spent before its basket is queued.
_BEFORE_QUEUE: Final = 0.6
#: Requests that a process reads in one turn of its loop.
_READ_AT_ONCE: Final = 256


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Measured costs, in seconds."""

    #: CPU time of an API process for one answer, sockets included.
    api_hold: float
    api_refusal: float
    api_shed: float
    #: CPU time of Redis: of a call by itself, and of each of its baskets.
    redis_call: float
    redis_hold: float
    redis_refusal: float
    #: One sync of the append-only file.
    sync: float
    #: A round trip between two machines.
    round_trip: float


class Fleet(msgspec.Struct, frozen=True):
    """The machines: processes of the API, and Redis servers with one partition each."""

    processes: int
    servers: int


class Crowd(msgspec.Struct, frozen=True, kw_only=True):
    """The buyers; each requests one unit."""

    buyers: int
    #: Their arrivals are uniformly distributed over this time.
    arrival_seconds: float = 0.0
    stock: int
    #: A buyer retries a 503 after this time, plus up to the same time at random.
    retry_seconds: float = 1.0
    #: Until this time, a new buyer replaces each one who was answered (a closed loop).
    replaced_until: float = 0.0


class Outcome(msgspec.Struct, kw_only=True):
    """Results; times are seconds since the first arrival."""

    held: int = 0
    sold_out: int = 0
    #: Requests answered with 503.
    shed: int = 0
    #: Time of the last hold, and of the last answer other than 503.
    sold_at: float = 0.0
    ended_at: float = 0.0
    #: Seconds from each buyer's first request to an answer other than 503.
    waits: list[float] = []
    #: CPU seconds of all processes, and of all servers.
    api_busy: float = 0.0
    redis_busy: float = 0.0

    def wait(self, share: float) -> float:
        """The quantile of the waits: this share of the buyers waited no longer."""
        ordered = sorted(self.waits)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


class _Request(msgspec.Struct, gc=False):
    """A request in progress."""

    #: Arrival time of its buyer.
    since: float
    #: The partition of its buyer.
    partition: int
    #: Time at which this attempt reached its process.
    queued_at: float = 0.0


class _Queue:
    """The queue of one partition in one process."""

    def __init__(self) -> None:
        self.queued: deque[_Request] = deque()
        self.is_sent = False
        self.sent_at = 0.0
        self.batch_seconds = 0.0

    def is_too_long(self, now: float) -> bool:
        """Whether a new prepare is shed, by the service's rules."""
        if self.queued and now - self.queued[0].queued_at > WAITING_SECONDS_MAX:
            return True
        batches = len(self.queued) / BASKETS_MAX
        return batches >= BATCHES_WAITING_MIN and batches * self.batch_seconds > WAITING_SECONDS_MAX

    def learn(self, count: int, now: float) -> None:
        """Update the estimate with the time of a full batch."""
        if count == BASKETS_MAX:
            took = now - self.sent_at
            self.batch_seconds = self.batch_seconds or took
            self.batch_seconds += LAST_BATCH_SHARE * (took - self.batch_seconds)


class _Reply(msgspec.Struct, gc=False):
    """The reply to a call: the first `holds` requests are held, the others sold out."""

    partition: int
    requests: list[_Request]
    holds: int


class _Process:
    """One API process."""

    def __init__(self, partitions: int) -> None:
        self.queues = [_Queue() for _ in range(partitions)]
        self.arrived: deque[_Request] = deque()
        self.replies: deque[_Reply] = deque()
        self.is_awake = False
        self.free_at = 0.0


class _Server:
    """One Redis server with one partition."""

    def __init__(self, stock: int) -> None:
        self.available = stock
        self.calls: list[tuple[_Process, list[_Request]]] = []
        self.is_awake = False
        self.free_at = 0.0


def simulate(costs: Costs, fleet: Fleet, crowd: Crowd, *, seed: int = 1) -> Outcome:
    """Run a sale until each buyer has an answer other than 503."""
    return _Simulation(costs, fleet, crowd, seed).run()


class _Simulation:
    def __init__(self, costs: Costs, fleet: Fleet, crowd: Crowd, seed: int) -> None:
        self._costs, self._crowd = costs, crowd
        self._draw = random.Random(seed)  # noqa: S311 - draws arrivals
        share, more = divmod(crowd.stock, fleet.servers)
        self._servers = [_Server(share + (number < more)) for number in range(fleet.servers)]
        self._processes = [_Process(fleet.servers) for _ in range(fleet.processes)]
        self._left = crowd.stock
        self._outcome = Outcome()
        #: Time, number and action: actions of one time keep their order.
        self._due: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = 0

    def run(self) -> Outcome:
        crowd = self._crowd
        arrivals = sorted(self._draw.uniform(0, crowd.arrival_seconds) for _ in range(crowd.buyers))
        coming = deque(arrivals)
        while coming or self._due:
            if coming and (not self._due or coming[0] <= self._due[0][0]):
                time = coming.popleft()
                self._arrive(self._new_buyer(time), time)
            else:
                time, _, action = heapq.heappop(self._due)
                action(time)
        return self._outcome

    def _at(self, time: float, action: Callable[[float], None]) -> None:
        self._numbers += 1
        heapq.heappush(self._due, (time, self._numbers, action))

    def _new_buyer(self, time: float) -> _Request:
        return _Request(time, self._draw.randrange(len(self._servers)))

    def _arrive(self, request: _Request, time: float) -> None:
        """The load balancer passes a request to a process."""
        process = self._draw.choice(self._processes)
        request.queued_at = time
        process.arrived.append(request)
        self._wake(process, time)

    def _wake(self, process: _Process, time: float) -> None:
        if not process.is_awake:
            process.is_awake = True
            self._at(max(time, process.free_at), lambda now: self._turn(process, now))

    def _turn(self, process: _Process, now: float) -> None:
        """One turn of a process's loop: answers, then new requests, then calls."""
        began, costs = now, self._costs
        while process.replies:
            now = self._answer(process, process.replies.popleft(), now)
        for _ in range(min(len(process.arrived), _READ_AT_ONCE)):
            request = process.arrived.popleft()
            queue = process.queues[request.partition]
            if queue.is_too_long(now):
                now += costs.api_shed
                self._shed(request, now)
            else:
                now += costs.api_hold * _BEFORE_QUEUE
                queue.queued.append(request)
        process.is_awake, process.free_at = False, now
        self._outcome.api_busy += now - began
        for partition, queue in enumerate(process.queues):
            if queue.queued and not queue.is_sent:
                self._send(process, partition, queue, now)
        if process.arrived or process.replies:
            self._wake(process, now)

    def _answer(self, process: _Process, reply: _Reply, now: float) -> float:
        """Write the responses of one call; returns the time after them."""
        queue, outcome, costs = process.queues[reply.partition], self._outcome, self._costs
        queue.is_sent = False
        queue.learn(len(reply.requests), now)
        for place, request in enumerate(reply.requests):
            if place < reply.holds:
                now += costs.api_hold * (1 - _BEFORE_QUEUE)
                outcome.held += 1
            else:
                now += costs.api_refusal - costs.api_hold * _BEFORE_QUEUE
                outcome.sold_out += 1
            outcome.ended_at = max(outcome.ended_at, now)
            outcome.waits.append(now - request.since)
            if now < self._crowd.replaced_until:
                again = now + costs.round_trip
                self._at(again, lambda time: self._arrive(self._new_buyer(time), time))
        return now

    def _shed(self, request: _Request, now: float) -> None:
        self._outcome.shed += 1
        pause = self._crowd.retry_seconds * (1 + self._draw.random())
        self._at(now + pause, lambda time: self._arrive(request, time))

    def _send(self, process: _Process, partition: int, queue: _Queue, now: float) -> None:
        """Send the next call of a queue."""
        requests = [queue.queued.popleft() for _ in range(min(len(queue.queued), BASKETS_MAX))]
        queue.is_sent, queue.sent_at = True, now
        server = self._servers[partition]

        def reached(time: float) -> None:
            server.calls.append((process, requests))
            self._wake_server(partition, time)

        self._at(now + self._costs.round_trip / 2, reached)

    def _wake_server(self, partition: int, time: float) -> None:
        server = self._servers[partition]
        if not server.is_awake:
            server.is_awake = True
            self._at(max(time, server.free_at), lambda now: self._run_scripts(partition, now))

    def _run_scripts(self, partition: int, now: float) -> None:
        """One turn of a Redis server: the scripts of the calls that wait, and one sync for all."""
        server, costs, began = self._servers[partition], self._costs, now
        calls, server.calls = server.calls, []
        replies: list[tuple[_Process, _Reply]] = []
        for process, requests in calls:
            holds = min(server.available, len(requests))
            server.available -= holds
            self._left -= holds
            refusals = len(requests) - holds
            now += costs.redis_call + holds * costs.redis_hold + refusals * costs.redis_refusal
            if holds and not self._left:
                self._outcome.sold_at = now
            replies.append((process, _Reply(partition, requests, holds)))
        self._outcome.redis_busy += now - began
        server.is_awake, server.free_at = False, now + costs.sync
        for process, reply in replies:
            self._reply(process, reply, server.free_at + costs.round_trip / 2)

    def _reply(self, process: _Process, reply: _Reply, time: float) -> None:
        def received(now: float) -> None:
            process.replies.append(reply)
            self._wake(process, now)

        self._at(time, received)
