"""Settings -> connected objects, opened in order and closed in reverse."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import NamedTuple

import msgspec
import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.audit import Audit
from reservation.audit.counters import CounterAudit
from reservation.audit.orders import OrderAudit
from reservation.audit.records import RecordAudit
from reservation.catalog import Catalog
from reservation.conclude import Conclude
from reservation.confirm import Confirm
from reservation.domain.clock import Clock, SystemClock
from reservation.domain.ids import OrderIds
from reservation.domain.rate import BuyerLimits
from reservation.domain.tokens import Signer
from reservation.follow_up import FollowUp
from reservation.gateway_health import GatewayHealth
from reservation.limits import DEFAULT_LIMITS, PaymentLimits
from reservation.look import Look
from reservation.losses import Losses
from reservation.orphans import Orphans
from reservation.payments.breaker import GuardedGateway
from reservation.payments.gateway import PaymentGateway
from reservation.payments.toss import TossGateway, TossLimits
from reservation.persistence.database import Database
from reservation.persistence.faults import reason_of
from reservation.persistence.ledger import Ledger
from reservation.preflight import Preflight
from reservation.preflight.outboxes import SalePreflight
from reservation.prepare import Prepare
from reservation.rebuild import Rebuild
from reservation.recheck import Recheck
from reservation.reclaim import Reclaim
from reservation.recovery import Watch
from reservation.redis.batch import PrepareQueue
from reservation.redis.connection import Connections
from reservation.redis.inspection import Inspection
from reservation.redis.keys import Keys
from reservation.redis.outbox import RedisOutbox
from reservation.redis.restore import Restorer
from reservation.redis.sales import SaleStore
from reservation.redis.store import Store
from reservation.redis.vouches import Vouches
from reservation.refund import Refund
from reservation.release import Release
from reservation.repair import Repair
from reservation.sales import Sales
from reservation.settings import Settings
from reservation.settle import Settle
from reservation.webhook import Webhook
from reservation.why import Why

__all__ = ["Service", "opened"]

log = structlog.get_logger(__name__)


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the roles and the endpoints use, connected."""

    settings: Settings
    clock: Clock
    connections: Connections
    keys: Keys
    store: Store
    sale_store: SaleStore
    outbox: RedisOutbox
    ledger: Ledger
    gateway: PaymentGateway
    health: GatewayHealth
    catalog: Catalog
    order_ids: OrderIds
    signer: Signer
    prepare: Prepare
    confirm: Confirm
    release: Release
    look: Look
    sales: Sales
    settle: Settle
    refund: Refund
    webhook: Webhook
    recheck: Recheck
    audit: Audit
    losses: Losses
    watch: Watch
    orphans: Orphans
    preflight: Preflight
    rebuild: Rebuild
    repair: Repair
    why: Why


@asynccontextmanager
async def opened(
    settings: Settings,
    *,
    clock: Clock | None = None,
    limits: PaymentLimits = DEFAULT_LIMITS,
    sql_may_be_away: bool = False,
) -> AsyncGenerator[Service]:
    """The service, connected to what the settings name.

    Tests bring a clock that they set, and shorter limits.

    Redis need not answer yet: each call says so itself.

    Args:
        sql_may_be_away: likewise of SQL; each use of it connects and migrates until one succeeds.

    Raises:
        SQLAlchemyError, OSError: SQL does not answer, and must.
    """
    clock = clock or SystemClock()
    async with AsyncExitStack() as stack:
        connections = Connections(settings.redis_url, clock=clock)
        stack.push_async_callback(connections.aclose)
        ledger = await _ledger(settings, stack, may_be_away=sql_may_be_away)
        gateway = _gateway(settings, limits)
        stack.push_async_callback(gateway.aclose)
        yield _assembled(stack, settings, connections, ledger, gateway, clock, limits)


def _assembled(
    stack: AsyncExitStack,
    settings: Settings,
    connections: Connections,
    ledger: Ledger,
    gateway: PaymentGateway,
    clock: Clock,
    limits: PaymentLimits,
) -> Service:
    """The verbs, around what is connected; what must end before it is put on the stack."""
    keys = Keys(settings.key_prefix)
    store, sale_store = Store(connections, keys, clock=clock), SaleStore(connections, keys)
    outbox, restorer = RedisOutbox(connections, keys), Restorer(connections.unguarded(), keys)
    catalog = Catalog(sale_store, ledger, clock=clock)
    queue = _queue(settings, connections, keys, store, clock)
    stack.push_async_callback(queue.aclose)
    order_ids = OrderIds(settings.order_id_key.encode())
    losses = _losses(connections, keys, restorer, ledger, catalog, clock)
    stack.push_async_callback(losses.leave)
    payments = _payments(stack, catalog, store, ledger, gateway, losses, clock, limits)
    health, orphans = payments.health, payments.orphans
    preflight, watch = _watch(settings, connections, keys, losses, ledger, catalog, health, clock)
    audit = _audit(Inspection(connections, keys, store), sale_store, ledger, outbox, clock)
    rebuild = _rebuild(keys, store, restorer, outbox, ledger, losses, orphans, clock)
    return Service(
        settings=settings,
        clock=clock,
        connections=connections,
        keys=keys,
        store=store,
        sale_store=sale_store,
        outbox=outbox,
        ledger=ledger,
        gateway=gateway,
        health=health,
        catalog=catalog,
        order_ids=order_ids,
        signer=Signer(settings.signing_keys),
        prepare=Prepare(catalog, queue, store, order_ids, watch),
        confirm=payments.confirm,
        release=Release(catalog, store, clock=clock),
        look=payments.look,
        sales=Sales(catalog, sale_store, ledger, gateway.limits, clock=clock),
        settle=payments.settle,
        refund=payments.refund,
        webhook=payments.webhook,
        recheck=payments.recheck,
        audit=audit,
        losses=losses,
        watch=watch,
        orphans=orphans,
        preflight=preflight,
        why=Why(sale_store, store, ledger, payments.look, clock=clock, limits=limits),
        rebuild=rebuild,
        repair=Repair(audit, rebuild, restorer, ledger),
    )


class _Payments(NamedTuple):
    health: GatewayHealth
    settle: Settle
    confirm: Confirm
    webhook: Webhook
    recheck: Recheck
    orphans: Orphans
    look: Look
    refund: Refund


def _payments(
    stack: AsyncExitStack,
    catalog: Catalog,
    store: Store,
    ledger: Ledger,
    gateway: PaymentGateway,
    losses: Losses,
    clock: Clock,
    limits: PaymentLimits,
) -> _Payments:
    """What takes a payment to its end; closed with the stack."""
    health = GatewayHealth(gateway, ledger, clock=clock)
    stack.push_async_callback(health.aclose)
    conclude = Conclude(store, ledger, gateway, losses, health, clock=clock, limits=limits)
    settle = Settle(catalog, store, ledger, gateway, conclude, health, clock=clock, limits=limits)
    confirm = Confirm(catalog, store, ledger, gateway, conclude, losses, clock=clock, limits=limits)
    stack.push_async_callback(confirm.aclose)
    follow_up = FollowUp(catalog, ledger, conclude)
    webhook = Webhook(catalog, store, ledger, gateway, follow_up, settle, clock=clock)
    recheck = Recheck(store, ledger, gateway, follow_up, clock=clock, limits=limits)
    orphans = Orphans(store, ledger, gateway, conclude, losses, health, clock=clock, limits=limits)
    look = Look(catalog, store, ledger, losses, clock=clock)
    refund = Refund(
        catalog, store, ledger, gateway, conclude, look, follow_up, clock=clock, limits=limits
    )
    stack.push_async_callback(refund.aclose)
    return _Payments(health, settle, confirm, webhook, recheck, orphans, look, refund)


async def _ledger(settings: Settings, stack: AsyncExitStack, *, may_be_away: bool) -> Ledger:
    ledger = Ledger(Database(settings.database_url or sqlite_url(settings)))
    stack.push_async_callback(ledger.aclose)
    try:
        await ledger.connect()
    except (SQLAlchemyError, OSError) as error:
        if not may_be_away:
            raise
        log.warning("started_without_sql", reason=reason_of(error))
    return ledger


def _queue(
    settings: Settings, connections: Connections, keys: Keys, store: Store, clock: Clock
) -> PrepareQueue:
    return PrepareQueue(
        connections, keys, expire=store.expire, clock=clock, limits=_buyer_limits(settings)
    )


def _watch(
    settings: Settings,
    connections: Connections,
    keys: Keys,
    losses: Losses,
    ledger: Ledger,
    catalog: Catalog,
    health: GatewayHealth,
    clock: Clock,
) -> tuple[Preflight, Watch]:
    # All three reach a server before it is vouched for.
    unguarded = connections.unguarded()
    preflight = Preflight(unguarded, keys, settings, clock=clock)
    of_sales = SalePreflight(unguarded, keys, SaleStore(unguarded, keys), ledger)
    vouches = Vouches(unguarded, keys)
    missing = _missing(preflight, health)
    watch = Watch(connections, losses, catalog, vouches, missing, of_sales)
    return preflight, watch


def _losses(
    connections: Connections,
    keys: Keys,
    restorer: Restorer,
    ledger: Ledger,
    catalog: Catalog,
    clock: Clock,
) -> Losses:
    # Orders are compared before their server is vouched for.
    store = Store(connections.unguarded(), keys, clock=clock)
    return Losses(connections, restorer, store, ledger, catalog, clock=clock)


def _rebuild(
    keys: Keys,
    store: Store,
    restorer: Restorer,
    outbox: RedisOutbox,
    ledger: Ledger,
    losses: Losses,
    orphans: Orphans,
    clock: Clock,
) -> Rebuild:
    reclaim = Reclaim(restorer, store, ledger)
    return Rebuild(restorer, keys, outbox, ledger, losses, reclaim, orphans, clock=clock)


def _missing(
    preflight: Preflight, health: GatewayHealth
) -> Callable[[], Awaitable[tuple[str, ...]]]:
    """What prepare lacks, by name: of Redis, and of the gateway."""

    async def missing() -> tuple[str, ...]:
        return (*await preflight.missing(), *health.missing())

    return missing


def _audit(
    inspection: Inspection, sales: SaleStore, ledger: Ledger, outbox: RedisOutbox, clock: Clock
) -> Audit:
    return Audit(
        CounterAudit(sales, ledger, outbox, clock=clock),
        OrderAudit(inspection, ledger),
        RecordAudit(inspection, ledger, outbox, clock=clock),
        clock=clock,
    )


def _buyer_limits(settings: Settings) -> BuyerLimits:
    return BuyerLimits(
        burst=settings.prepare_rate,
        sustained=settings.prepare_sustained,
        unpaid_orders=settings.unpaid_orders,
    )


def _gateway(settings: Settings, limits: PaymentLimits) -> PaymentGateway:
    toss = TossGateway(
        base_url=settings.toss_api_url,
        secret_key=settings.toss_secret_key,
        limits=TossLimits(
            confirm_seconds=limits.confirm_seconds,
            cancel_seconds=limits.confirm_seconds,
            look_up_seconds=limits.look_up_seconds,
        ),
    )
    return GuardedGateway(toss)


def sqlite_url(settings: Settings) -> str:
    """SQLite in the data directory."""
    return f"sqlite:///{settings.data_dir / 'orders.sqlite3'}"
