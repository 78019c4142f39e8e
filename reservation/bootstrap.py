"""Composition root: builds the connected objects from the settings and closes them in reverse."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.adapters.redis.ack_probes import AckProbes
from reservation.adapters.redis.audit_reader import AuditReader
from reservation.adapters.redis.client import RedisClient
from reservation.adapters.redis.cluster import open_client
from reservation.adapters.redis.keys import Keys
from reservation.adapters.redis.outbox import RedisOutbox
from reservation.adapters.redis.partitions.transfers import Transfers
from reservation.adapters.redis.prepare_queue import PrepareQueue
from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.adapters.redis.sale_store import SaleStore
from reservation.adapters.redis.sale_writer import SaleWriter
from reservation.adapters.redis.tombstones import TombstoneStore
from reservation.adapters.redis.vouches import Vouches
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.errors import reason_of
from reservation.adapters.sql.store import SqlStore
from reservation.adapters.toss.circuit_breaker import GuardedListingGateway
from reservation.adapters.toss.client import TossGateway, TossLimits
from reservation.adapters.webhooks.sender import WebhookSender
from reservation.application.audit.audit import Audit
from reservation.application.audit.counters import CounterAudit
from reservation.application.audit.orders import OrderAudit
from reservation.application.audit.records import RecordAudit
from reservation.application.audit.retired import RetiredAudit
from reservation.application.audit.tombstones import TombstoneAudit
from reservation.application.events.endpoints import WebhookEndpoints
from reservation.application.events.feed import EventFeed
from reservation.application.payments.absence import Absence
from reservation.application.payments.confirm import PaymentConfirmation
from reservation.application.payments.follow_up import FollowUp
from reservation.application.payments.gateway_health import GatewayHealth
from reservation.application.payments.orphaned import OrphanedPayments
from reservation.application.payments.recheck import Recheck
from reservation.application.payments.refunds import RefundService
from reservation.application.payments.requests import OrderRequests
from reservation.application.payments.resolve import PaymentResolver
from reservation.application.payments.settle import PaymentSettlement
from reservation.application.payments.systems import PaymentSystems
from reservation.application.payments.webhooks import PaymentNotifications
from reservation.application.readiness.check import Preflight
from reservation.application.readiness.data_loss import DataLossDetector
from reservation.application.readiness.redis_monitor import RedisMonitor
from reservation.application.readiness.sale_conditions import SalePreflight
from reservation.application.reconciliation.comparison import Comparison
from reservation.application.recovery.automatic import AutomaticRebuild
from reservation.application.recovery.peers import PartitionPeers
from reservation.application.recovery.rebuild import Rebuild
from reservation.application.recovery.reclaim import Reclaim
from reservation.application.recovery.repair import Repair
from reservation.application.recovery.tombstones import RestoredTombstones
from reservation.application.reservations.acknowledged_reads import AcknowledgedReads
from reservation.application.reservations.explain import Explain
from reservation.application.reservations.order_store import OrderStore
from reservation.application.reservations.prepare import PrepareReservations
from reservation.application.reservations.queries import ReservationQueries
from reservation.application.reservations.release import Release
from reservation.application.reservations.tombstones import TombstonedOrders
from reservation.application.retention.purge import Purge
from reservation.application.retention.retirement import Retirement
from reservation.application.retention.tombstones import TombstoneRounds, keep_ms_of
from reservation.application.sales.catalog import Catalog
from reservation.application.sales.manage import SaleAdministration
from reservation.config.settings import Settings
from reservation.domain.clock import Clock, SystemClock
from reservation.domain.ids import OrderIds
from reservation.domain.payment_gateway import PaymentGateway
from reservation.domain.payment_timeouts import DEFAULT_LIMITS, PaymentTimeouts
from reservation.domain.rate_limit import BuyerLimits
from reservation.domain.tokens import Signer

__all__ = ["Events", "Service", "opened"]

log = structlog.get_logger(__name__)


class Events(NamedTuple):
    """The event feed and the webhooks made from it."""

    feed: EventFeed
    sender: WebhookSender
    endpoints: WebhookEndpoints


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """The connected objects that the roles and the endpoints use."""

    settings: Settings
    clock: Clock
    connections: RedisClient
    keys: Keys
    store: ReservationStore
    sale_store: SaleStore
    outbox: RedisOutbox
    sql: SqlStore
    gateway: PaymentGateway
    health: GatewayHealth
    catalog: Catalog
    order_ids: OrderIds
    signer: Signer
    preparation: PrepareReservations
    confirmation: PaymentConfirmation
    releases: Release
    queries: ReservationQueries
    sales: SaleAdministration
    settlement: PaymentSettlement
    refunds: RefundService
    requests: OrderRequests
    notifications: PaymentNotifications
    recheck: Recheck
    audit: Audit
    data_loss: DataLossDetector
    redis_monitor: RedisMonitor
    orphaned_payments: OrphanedPayments
    readiness: Preflight
    comparison: Comparison
    rebuild: Rebuild
    automatic_rebuild: AutomaticRebuild
    repair: Repair
    retirement: Retirement
    purge: Purge
    tombstones: TombstoneRounds
    explain: Explain
    events: Events


@asynccontextmanager
async def opened(
    settings: Settings,
    *,
    clock: Clock | None = None,
    limits: PaymentTimeouts = DEFAULT_LIMITS,
    sql_may_be_away: bool = False,
) -> AsyncGenerator[Service]:
    """Open the service, connected to the servers that the settings name.

    Tests pass a clock that they set, and shorter limits.

    Redis may still be down: each call then raises its own error.

    Args:
        sql_may_be_away: SQL may be down too; each use connects and migrates until one succeeds.

    Raises:
        SQLAlchemyError, OSError: SQL does not answer and `sql_may_be_away` is false.
    """
    clock = clock or SystemClock()
    async with AsyncExitStack() as stack:
        connections = open_client(
            settings.redis_url, clock=clock, ack_replicas=settings.redis_ack_replicas
        )
        stack.push_async_callback(connections.aclose)
        sql = await _sql(settings, stack, may_be_away=sql_may_be_away)
        gateway = _gateway(settings, limits)
        stack.push_async_callback(gateway.aclose)
        yield _assembled(stack, settings, connections, sql, gateway, clock, limits)


def _assembled(
    stack: AsyncExitStack,
    settings: Settings,
    connections: RedisClient,
    sql: SqlStore,
    gateway: GuardedListingGateway,
    clock: Clock,
    limits: PaymentTimeouts,
) -> Service:
    """Wire the use cases to the connections; those that must close first go on the stack."""
    keys, order_ids = Keys(settings.key_prefix), OrderIds(settings.order_id_key.encode())
    sale_store, outbox = SaleStore(connections, keys), RedisOutbox(connections, keys)
    catalog = Catalog(sale_store, sql, clock=clock)
    store, tombstones = _orders(settings, connections, keys, sql, catalog, clock)
    queue = _queue(stack, settings, connections, keys, store, clock)
    data_loss = _losses(stack, connections, keys, sql, catalog, clock)
    systems = PaymentSystems(catalog, store, sql, gateway, clock, limits)
    payments = _payments(stack, systems, data_loss)
    readiness, monitor = _watch(settings, connections, keys, data_loss, systems, payments.health)
    audit = _audit(AuditReader(connections, keys, store), sale_store, sql, outbox, clock)
    rebuild = _rebuild(connections, keys, store, outbox, sql, data_loss, payments, clock)
    return Service(
        settings=settings,
        clock=clock,
        connections=connections,
        keys=keys,
        store=store,
        sale_store=sale_store,
        outbox=outbox,
        sql=sql,
        gateway=gateway,
        health=payments.health,
        catalog=catalog,
        order_ids=order_ids,
        signer=Signer(settings.signing_keys),
        preparation=PrepareReservations(catalog, queue, store, order_ids, monitor),
        confirmation=payments.confirmation,
        releases=Release(catalog, store, AcknowledgedReads(catalog, store, sql), clock=clock),
        queries=payments.queries,
        sales=SaleAdministration(catalog, sale_store, sql, gateway.limits, clock=clock),
        settlement=payments.settlement,
        refunds=payments.refunds,
        requests=payments.requests,
        notifications=payments.notifications,
        recheck=payments.recheck,
        audit=audit,
        data_loss=data_loss,
        redis_monitor=monitor,
        orphaned_payments=payments.orphaned_payments,
        readiness=readiness,
        explain=_explain(systems, sale_store, payments.queries),
        comparison=_comparison(systems, sale_store, outbox, data_loss, gateway),
        rebuild=rebuild,
        automatic_rebuild=AutomaticRebuild(rebuild, catalog, sql, clock=clock),
        repair=Repair(audit, rebuild, SaleWriter(connections.unguarded(), keys), sql),
        purge=Purge(sql, days=settings.retention_days, clock=clock),
        retirement=_retirement(connections, keys, sql, catalog, audit, outbox, clock),
        tombstones=tombstones,
        events=_events(stack, settings, sql, clock),
    )


def _events(stack: AsyncExitStack, settings: Settings, sql: SqlStore, clock: Clock) -> Events:
    """The use cases of events; the sender's connections are closed with the stack."""
    sender = WebhookSender(allow_private=settings.webhook_allow_private)
    stack.push_async_callback(sender.aclose)
    return Events(EventFeed(sql), sender, WebhookEndpoints(sql, sender, clock=clock))


def _orders(
    settings: Settings,
    connections: RedisClient,
    keys: Keys,
    sql: SqlStore,
    catalog: Catalog,
    clock: Clock,
) -> tuple[OrderStore, TombstoneRounds]:
    keep_ms = keep_ms_of(_buyer_limits(settings))
    tombstones = TombstoneStore(connections, keys)
    ended = TombstonedOrders(tombstones, sql, keep_ms=keep_ms)
    store = OrderStore(connections, keys, sql, catalog.is_retired, ended, clock=clock)
    rounds = TombstoneRounds(connections, tombstones, sql, catalog, clock=clock, keep_ms=keep_ms)
    return store, rounds


class _Payments(NamedTuple):
    health: GatewayHealth
    settlement: PaymentSettlement
    confirmation: PaymentConfirmation
    notifications: PaymentNotifications
    recheck: Recheck
    orphaned_payments: OrphanedPayments
    queries: ReservationQueries
    refunds: RefundService
    requests: OrderRequests


def _payments(
    stack: AsyncExitStack, systems: PaymentSystems, data_loss: DataLossDetector
) -> _Payments:
    """The payment use cases; closed with the stack."""
    health = GatewayHealth(systems.gateway, systems.sql, clock=systems.clock)
    stack.push_async_callback(health.aclose)
    resolver = PaymentResolver(systems, data_loss, health)
    absence = Absence(systems, resolver, health)
    settlement = PaymentSettlement(systems, resolver, absence)
    confirmation = PaymentConfirmation(systems, resolver, data_loss)
    stack.push_async_callback(confirmation.aclose)
    follow_up = FollowUp(systems.catalog, systems.sql, resolver)
    notifications = PaymentNotifications(systems, confirmation, follow_up, settlement)
    recheck = Recheck(systems, follow_up)
    orphaned_payments = OrphanedPayments(systems, resolver, data_loss, absence)
    reads = AcknowledgedReads(systems.catalog, systems.store, systems.sql)
    queries = ReservationQueries(
        systems.catalog, systems.store, systems.sql, data_loss, reads, clock=systems.clock
    )
    refunds = RefundService(systems, resolver, queries, follow_up)
    stack.push_async_callback(refunds.aclose)
    requests = OrderRequests(systems, settlement)
    stack.push_async_callback(requests.aclose)
    return _Payments(
        health,
        settlement,
        confirmation,
        notifications,
        recheck,
        orphaned_payments,
        queries,
        refunds,
        requests,
    )


async def _sql(settings: Settings, stack: AsyncExitStack, *, may_be_away: bool) -> SqlStore:
    sql = SqlStore(Database(settings.database_url or sqlite_url(settings)))
    stack.push_async_callback(sql.aclose)
    try:
        await sql.database.connect()
    except (SQLAlchemyError, OSError) as error:
        if not may_be_away:
            raise
        log.warning("started_without_sql", reason=reason_of(error))
    return sql


def _queue(
    stack: AsyncExitStack,
    settings: Settings,
    connections: RedisClient,
    keys: Keys,
    store: ReservationStore,
    clock: Clock,
) -> PrepareQueue:
    """The queue of prepares; closed with the stack."""
    queue = PrepareQueue(
        connections, keys, expiry=store.expiry, clock=clock, limits=_buyer_limits(settings)
    )
    stack.push_async_callback(queue.aclose)
    return queue


def _watch(
    settings: Settings,
    connections: RedisClient,
    keys: Keys,
    data_loss: DataLossDetector,
    systems: PaymentSystems,
    health: GatewayHealth,
) -> tuple[Preflight, RedisMonitor]:
    # All three call a server before it is vouched for.
    unguarded = connections.unguarded()
    readiness = Preflight(unguarded, keys, settings, clock=systems.clock)
    of_sales = SalePreflight(unguarded, keys, SaleStore(unguarded, keys), systems.sql)
    vouches = Vouches(unguarded, keys)
    missing = _missing(readiness, health)
    redis_monitor = RedisMonitor(
        connections,
        data_loss,
        systems.catalog,
        vouches,
        missing,
        of_sales.check,
        readiness.missing_at,
        AckProbes(connections, keys),
    )
    return readiness, redis_monitor


def _losses(
    stack: AsyncExitStack,
    connections: RedisClient,
    keys: Keys,
    sql: SqlStore,
    catalog: Catalog,
    clock: Clock,
) -> DataLossDetector:
    # Orders are compared before their server is vouched for.
    store = ReservationStore(connections.unguarded(), keys, clock=clock)
    sale_writer = SaleWriter(connections.unguarded(), keys)
    data_loss = DataLossDetector(connections, sale_writer, store, sql, catalog, clock=clock)
    stack.push_async_callback(data_loss.leave)
    return data_loss


def _rebuild(
    connections: RedisClient,
    keys: Keys,
    store: OrderStore,
    outbox: RedisOutbox,
    sql: SqlStore,
    data_loss: DataLossDetector,
    payments: _Payments,
    clock: Clock,
) -> Rebuild:
    # A worker rebuilds only on a server that is vouched for.
    sale_writer = SaleWriter(connections, keys)
    # A rebuild borrows for no order, so no limit of a buyer applies.
    transfers = Transfers(connections, keys, clock=clock, limits=BuyerLimits())
    reclaim = Reclaim(sale_writer, store, sql)
    return Rebuild(
        connections,
        sale_writer,
        keys,
        outbox,
        sql,
        data_loss,
        PartitionPeers(transfers, sql),
        reclaim,
        payments.orphaned_payments,
        RestoredTombstones(keys, sql, clock=clock, keep_ms=store.keep_ms),
        clock=clock,
    )


def _explain(systems: PaymentSystems, sales: SaleStore, queries: ReservationQueries) -> Explain:
    return Explain(
        systems.catalog,
        sales,
        systems.store,
        systems.sql,
        queries,
        clock=systems.clock,
        limits=systems.limits,
    )


def _comparison(
    systems: PaymentSystems,
    sales: SaleStore,
    outbox: RedisOutbox,
    data_loss: DataLossDetector,
    gateway: GuardedListingGateway,
) -> Comparison:
    return Comparison(
        systems.sql, systems.store, sales, outbox, data_loss, gateway, gateway, clock=systems.clock
    )


def _retirement(
    connections: RedisClient,
    keys: Keys,
    sql: SqlStore,
    catalog: Catalog,
    audit: Audit,
    outbox: RedisOutbox,
    clock: Clock,
) -> Retirement:
    sales, writer = SaleStore(connections, keys), SaleWriter(connections, keys)
    return Retirement(connections, sales, writer, sql, catalog, audit, outbox, clock=clock)


def _missing(
    readiness: Preflight, health: GatewayHealth
) -> Callable[[], Awaitable[tuple[str, ...]]]:
    """The failed conditions of prepare, by name: of Redis and of the gateway."""

    async def missing() -> tuple[str, ...]:
        return (*await readiness.missing(), *health.missing())

    return missing


def _audit(
    audit_reader: AuditReader, sales: SaleStore, sql: SqlStore, outbox: RedisOutbox, clock: Clock
) -> Audit:
    return Audit(
        CounterAudit(sales, sql, outbox, clock=clock),
        OrderAudit(audit_reader, sql, clock=clock),
        RecordAudit(audit_reader, sql, outbox, clock=clock),
        TombstoneAudit(audit_reader.tombstones, sql),
        RetiredAudit(sql, clock=clock),
        clock=clock,
    )


def _buyer_limits(settings: Settings) -> BuyerLimits:
    return BuyerLimits(
        burst=settings.prepare_rate,
        sustained=settings.prepare_sustained,
        unpaid_orders=settings.unpaid_orders,
    )


def _gateway(settings: Settings, limits: PaymentTimeouts) -> GuardedListingGateway:
    toss = TossGateway(
        base_url=settings.toss_api_url,
        secret_key=settings.toss_secret_key,
        limits=TossLimits(
            confirm_seconds=limits.confirm_seconds,
            cancel_seconds=limits.confirm_seconds,
            look_up_seconds=limits.look_up_seconds,
        ),
    )
    return GuardedListingGateway(toss, toss)


def sqlite_url(settings: Settings) -> str:
    """The URL of the SQLite file in the data directory."""
    return f"sqlite:///{settings.data_dir / 'orders.sqlite3'}"
