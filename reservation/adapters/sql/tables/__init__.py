"""The tables of the newest migration.

Instants are BIGINT Unix milliseconds, as in Redis and in its events: no time zone, no rounding, a
total order. The wire converts them. Amounts are integers in the currency's minor unit.

    sales 1--1 cursors                  the last event written from the outbox
    sales 1--n items                    the items on sale, each with four counters
    sales 1--n orders 1--n order_lines  the state of each order after its last event
    sales 1--n events                   every change, chained by hash
    sales 1--n stock_movements          the counter changes of each event
    payment_attempts 1--n payment_intents   written before the PG is asked for money
    payment_answers, payments, refunds      answers of the PG, their payments, refunds
    payment_checks                          payments to look up again, with a due time
    marks, processes, losses            high-water marks of Redis, and lost events
    installation                        the level of the installation
    operator_keys                       operators' keys, as hashes
    order_requests, sale_requests       operators' requests that no event records
    rebuilds                            the last rebuild of each sale
    transfers                           the lends of each partition, which is a row of `sales`
    feed_heads 1--n feed_ranges, feed_notices   the ids of events, and the sales' own notices
    feed_positions                      the last event of each sale that has an id
    webhook_endpoints 1--n webhook_deliveries   the log of deliveries, bounded
"""

from reservation.adapters.sql.tables.columns import metadata
from reservation.adapters.sql.tables.feed import (
    feed_heads,
    feed_notices,
    feed_positions,
    feed_ranges,
)
from reservation.adapters.sql.tables.installation import (
    installation,
    losses,
    marks,
    probes,
    processes,
    rebuilds,
    restores,
)
from reservation.adapters.sql.tables.operators import (
    operator_keys,
    order_requests,
    sale_requests,
)
from reservation.adapters.sql.tables.orders import (
    order_lines,
    orders,
)
from reservation.adapters.sql.tables.payments import (
    differences,
    payment_answers,
    payment_attempts,
    payment_checks,
    payment_intents,
    payments,
    refunds,
)
from reservation.adapters.sql.tables.sales import (
    cursors,
    events,
    items,
    purges,
    sales,
    stock_movements,
    transfers,
)
from reservation.adapters.sql.tables.webhooks import (
    webhook_deliveries,
    webhook_endpoints,
)

__all__ = [
    "cursors",
    "differences",
    "events",
    "feed_heads",
    "feed_notices",
    "feed_positions",
    "feed_ranges",
    "installation",
    "items",
    "losses",
    "marks",
    "metadata",
    "operator_keys",
    "order_lines",
    "order_requests",
    "orders",
    "payment_answers",
    "payment_attempts",
    "payment_checks",
    "payment_intents",
    "payments",
    "probes",
    "processes",
    "purges",
    "rebuilds",
    "refunds",
    "restores",
    "sale_requests",
    "sales",
    "stock_movements",
    "transfers",
    "webhook_deliveries",
    "webhook_endpoints",
]
