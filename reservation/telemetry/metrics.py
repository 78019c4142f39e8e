"""Prometheus metrics of the service, which the API exposes on /metrics."""

import os
import platform
import time
from bisect import bisect_left
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Final, cast

import structlog
from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    start_http_server,
    values,
)
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.multiprocess import MultiProcessCollector

from reservation import __version__
from reservation.domain.alarms import Alarm
from reservation.domain.payment import PaymentOutcome
from reservation.domain.rate_limit import Limiter, Rate

__all__ = [
    "ALARMS",
    "ALARM_RAISED",
    "BUILD_INFO",
    "HTTP_REFUSALS",
    "HTTP_SECONDS",
    "LOST_EVENTS",
    "OUTBOX_AGE",
    "OUTBOX_BACKLOG",
    "PENDING_REFUNDS",
    "PENDING_REFUNDS_AGE",
    "PREPARE_CLOSED",
    "REAPED",
    "REBUILDS",
    "SALES",
    "SETTLED",
    "WEBHOOKS",
    "WEBHOOK_DELIVERIES",
    "WORKERS",
    "WORKER_BEAT",
    "WORKER_CLOCK_OFFSET",
    "WORKER_SALES",
    "Durations",
    "alarm",
    "registry",
    "served",
]

log = structlog.get_logger(__name__)

if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
    # Our processes never fork, so the pid is read once. The library would make a system call at
    # every count, twice per response.
    _pid = os.getpid()
    _shared: Any = cast("Any", values)
    _shared.ValueClass = _shared.MultiProcessValue(process_identifier=lambda: _pid)


class Durations(Histogram):
    """A histogram that counts a batch at the cost of one: each count is written to a file."""

    def observe_all(self, seconds: Sequence[float]) -> None:
        """The same as `observe` for each of them."""
        counts: dict[int, int] = {}
        for each in seconds:
            # Bounds are upper ones, and the last is infinite.
            place = bisect_left(self._upper_bounds, each)
            counts[place] = counts.get(place, 0) + 1
        # The library gives its values no types.
        histogram = cast("Any", self)
        histogram._sum.inc(sum(seconds))  # noqa: SLF001 - as `observe` does
        for place, count in counts.items():
            histogram._buckets[place].inc(count)  # noqa: SLF001


ALARMS: Final = Counter("reservation_alarms_total", "Alarms for an operator, by name.", ["alarm"])
#: Read by the alert rules. A counter would hide alarms from them: one raised before the first
#: scrape, and one that counts up to the same number again after a restart.
ALARM_RAISED: Final = Gauge(
    "reservation_alarm_raised_timestamp_seconds",
    "Time at which each alarm was last raised; 0 if never.",
    ["alarm"],
    multiprocess_mode="max",
)
for _alarm in Alarm:
    ALARMS.labels(_alarm)
    ALARM_RAISED.labels(_alarm)
BUILD_INFO: Final = Gauge(
    "reservation_build_info",
    "Always 1; labels carry the versions of the service and of Python.",
    ["version", "python"],
    multiprocess_mode="livemax",
)
BUILD_INFO.labels(__version__, platform.python_version()).set(1)
PREPARE_CLOSED: Final = Gauge(
    "reservation_prepare_closed",
    "1 while prepare is closed for this reason, in the whole service or in one sale.",
    ["reason"],
    multiprocess_mode="livemax",
)
WORKER_BEAT: Final = Gauge(
    "reservation_worker_beat_timestamp_seconds",
    "Time of the last heartbeat of a worker; 0 if none.",
    multiprocess_mode="max",
)
WORKER_CLOCK_OFFSET: Final = Gauge(
    "reservation_worker_clock_offset_seconds",
    "Redis' clock minus the worker's clock; beyond 2 s the worker expires no holds.",
    multiprocess_mode="mostrecent",
)
WORKERS: Final = Gauge(
    "reservation_workers",
    "Workers that share the sales, as seen by this worker; 0 if none runs.",
    multiprocess_mode="mostrecent",
)
WORKER_SALES: Final = Gauge(
    "reservation_worker_sales",
    "Sales that this worker serves; the sum over all workers is at least the number of sales.",
    multiprocess_mode="mostrecent",
)
SALES: Final = Gauge(
    "reservation_sales",
    "All sales, as seen by this worker.",
    multiprocess_mode="mostrecent",
)
WEBHOOKS: Final = Counter(
    "reservation_webhooks_total", "Webhooks of the payment gateway about known orders."
)
WEBHOOK_DELIVERIES: Final = Counter(
    "reservation_webhook_deliveries_total",
    "Attempts to deliver a webhook to a shop, by outcome.",
    ["outcome"],
)
for _delivery in ("delivered", "retried", "failed"):
    WEBHOOK_DELIVERIES.labels(_delivery)
PAYMENTS: Final = Counter(
    "reservation_payment_outcomes_total", "Ended payment attempts, by outcome.", ["outcome"]
)
REAPED: Final = Counter("reservation_expired_total", "Expired holds.")
SETTLED: Final = Counter(
    "reservation_settled_total",
    "Unknown payments that the settler checked, by outcome.",
    ["outcome"],
)
for _outcome in PaymentOutcome:
    PAYMENTS.labels(_outcome)
FLUSHED: Final = Counter("reservation_flushed_events_total", "Events written to SQL.")
LOST_EVENTS: Final = Counter(
    "reservation_lost_events_total",
    "Acknowledged events that a rebuild found in neither Redis nor SQL.",
)
REBUILDS: Final = Counter("reservation_rebuilds_total", "Sales rebuilt by this service.")
OUTBOX_BACKLOG: Final = Gauge(
    "reservation_outbox_backlog_events",
    "Events in the outbox that are not in SQL yet.",
    ["sale"],
    multiprocess_mode="mostrecent",
)
OUTBOX_AGE: Final = Gauge(
    "reservation_outbox_oldest_seconds",
    "Age of the oldest event that is not in SQL yet.",
    ["sale"],
    multiprocess_mode="mostrecent",
)
UNDECIDED: Final = Gauge(
    "reservation_undecided_payments",
    "Orders in CONFIRMING.",
    ["sale"],
    multiprocess_mode="mostrecent",
)
PENDING_REFUNDS: Final = Gauge(
    "reservation_pending_refunds",
    "Pending refunds.",
    multiprocess_mode="mostrecent",
)
PENDING_REFUNDS_AGE: Final = Gauge(
    "reservation_pending_refunds_oldest_seconds",
    "Age of the oldest pending refund.",
    multiprocess_mode="mostrecent",
)
HTTP_SECONDS: Final = Durations(
    "reservation_http_request_seconds",
    "Duration of requests.",
    ["operation", "status"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)

HTTP_REFUSALS: Final = Counter(
    "reservation_http_refusals_total",
    "Requests and connections that the server refused before they reached the application.",
    ["code"],
)


def registry() -> CollectorRegistry:
    """The registry to expose: all processes of this host if they share a metrics directory."""
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return REGISTRY
    shared = CollectorRegistry()
    MultiProcessCollector(shared)
    return shared


@contextmanager
def served(host: str, port: int) -> Generator[None]:
    """Serve `/metrics` from its own thread; port 0 serves nothing."""
    if not port:
        yield
        return
    # The replacement of a process serves the port before the process ends.
    ThreadingWSGIServer.allow_reuse_port = True
    server, thread = start_http_server(port, host, registry())
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_repeated: Final = Limiter(Rate(count=1, per_seconds=60))


def alarm(name: Alarm, **facts: str | int | None) -> None:
    """Raise an alarm: the metrics behind the alert rule, and a log line with the ids.

    Each name counts once a minute per order: the settler checks an order far more often than that.
    """
    order_id = facts.get("order_id")
    if order_id is not None and _repeated.wait(f"{name.value} {order_id}", time.monotonic()):
        return
    ALARMS.labels(name).inc()
    ALARM_RAISED.labels(name).set(time.time())
    log.error("alarm", alarm=name.value, **facts)
