"""The SQL store: one repository per aggregate over one database."""

from reservation.adapters.sql.differences import DifferenceRepository
from reservation.adapters.sql.engine import Database
from reservation.adapters.sql.events import EventRepository
from reservation.adapters.sql.feed import FeedRepository
from reservation.adapters.sql.installation import InstallationRepository
from reservation.adapters.sql.operator_keys import OperatorKeyRepository
from reservation.adapters.sql.order_requests import OrderRequestRepository
from reservation.adapters.sql.orders import OrderRepository
from reservation.adapters.sql.payment_intents import IntentRepository
from reservation.adapters.sql.payments import PaymentRepository
from reservation.adapters.sql.purges import PurgeRepository
from reservation.adapters.sql.rebuilds import RebuildRepository
from reservation.adapters.sql.refunds import RefundRepository
from reservation.adapters.sql.restores import RestoreRepository
from reservation.adapters.sql.retired_orders import RetiredOrderRepository
from reservation.adapters.sql.sale_changes import SaleChangeRepository
from reservation.adapters.sql.sales import SaleRepository
from reservation.adapters.sql.transfers import TransferRepository
from reservation.adapters.sql.webhooks import WebhookRepository

__all__ = ["SqlStore"]


class SqlStore:
    """The repositories of one database, which they share.

    Each method of a repository is one transaction or one read. Writes are idempotent unless their
    docstring says otherwise: a repeat returns the same answer and has no effect. Any call may raise
    `sqlalchemy.exc.SQLAlchemyError` or `OSError` where the database is unreachable or does not
    respond in time. A write that raised may have happened; retry it to find out.

    Payment attempts and intents have their own repository: an intent exists before its payment
    does, a void without any, and both exclude double charges together.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        self.sales = SaleRepository(database)
        self.orders = OrderRepository(database)
        self.intents = IntentRepository(database)
        self.payments = PaymentRepository(database)
        self.refunds = RefundRepository(database)
        self.events = EventRepository(database)
        self.feed = FeedRepository(database)
        self.installation = InstallationRepository(database)
        self.rebuilds = RebuildRepository(database)
        self.retired_orders = RetiredOrderRepository(database)
        self.restores = RestoreRepository(database)
        self.differences = DifferenceRepository(database)
        self.purges = PurgeRepository(database)
        self.transfers = TransferRepository(database)
        self.order_requests = OrderRequestRepository(database)
        self.sale_changes = SaleChangeRepository(database)
        self.operator_keys = OperatorKeyRepository(database)
        self.webhooks = WebhookRepository(database)

    @classmethod
    async def open(cls, url: str) -> "SqlStore":
        """Connect to `sqlite:///PATH` or `postgresql://...`, and migrate.

        Raises:
            ValueError: the URL is of neither kind.
            DatabaseUnfit: the database must not be used, or its tables cannot be made.
        """
        return cls(await Database.open(url))

    async def aclose(self) -> None:
        """Finish writes in progress, and close the connections."""
        await self.events.aclose()
        await self.intents.aclose()
        await self.payments.aclose()
        await self.database.aclose()
