"""The systems between which a payment moves, and the base of everything that moves one."""

import msgspec

from reservation.adapters.redis.reservation_store import ReservationStore
from reservation.adapters.sql.store import SqlStore
from reservation.application.sales.catalog import Catalog
from reservation.domain.clock import Clock
from reservation.domain.payment_gateway import PaymentGateway
from reservation.domain.payment_timeouts import DEFAULT_LIMITS, PaymentTimeouts

__all__ = ["PaymentSystems", "PaymentUseCase"]


class PaymentSystems(msgspec.Struct, frozen=True):
    """Redis, SQL and the PG, with the clock and the time limits of a payment."""

    catalog: Catalog
    store: ReservationStore
    sql: SqlStore
    gateway: PaymentGateway
    clock: Clock
    limits: PaymentTimeouts = DEFAULT_LIMITS


class PaymentUseCase:
    """Base of the payment use cases: each reads and writes in all of the systems."""

    def __init__(self, systems: PaymentSystems) -> None:
        self._catalog = systems.catalog
        self._store = systems.store
        self._sql = systems.sql
        self._gateway = systems.gateway
        self._clock = systems.clock
        self._limits = systems.limits
