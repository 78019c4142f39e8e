"""Notices a Redis that lost a sale or went back in time, before anything is sold from it.

The scripts see a lost key and another epoch by themselves. What they cannot see is a server that
came back with an older state of the right epoch: a file that lost its end, a restored backup. So
prepares go only to a server whose sales were compared with SQL in this very life of it
(`Connections.guard`), and the comparison is repeated every few seconds.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Final

import structlog
from sqlalchemy.exc import SQLAlchemyError

from reservation.catalog import Catalog
from reservation.domain.alarms import Alarm
from reservation.domain.errors import Unavailable
from reservation.metrics import PREPARE_CLOSED, alarm
from reservation.persistence.faults import reason_of
from reservation.persistence.ledger import Ledger
from reservation.persistence.recovery import SaleHead
from reservation.redis.connection import Connections
from reservation.redis.replies import StoreUnavailable, StoreUncertain
from reservation.redis.restore import Found, Restorer
from reservation.redis.vouches import Vouches

__all__ = ["Watch", "compare"]

log = structlog.get_logger(__name__)

#: Between two looks. With the look itself well under the 6 s in which readiness must tell.
LOOK_SECONDS: Final = 3.0
#: Between two looks while no server is vouched for, and buyers wait.
HURRY_SECONDS: Final = 0.3
#: Between two looks while SQL is away, so that what waits for it goes on at once.
AWAY_SECONDS: Final = 1.0
#: How long SQL may take for one answer; each of Redis' has its own bound. The whole look has none:
#: it would fail for good where there are too many sales for it.
ANSWER_SECONDS_MAX: Final = 2.5
#: Sales of one round trip.
SALES_AT_ONCE: Final = 200
#: SQL is read before Redis, and a rebuild may finish in between: what looks lost is looked at
#: again after this long.
AGAIN_SECONDS: Final = 0.05
#: What a buyer is told to wait while the server is not as it must be.
RETRY_AFTER_SECONDS: Final = 5


def compare(head: SaleHead, found: Found | None) -> str | None:
    """What is wrong with Redis' state of a sale, read after SQL's; None where nothing is.

    Redis ahead of SQL is as it should be: the flusher follows.
    """
    if found is None:
        return f"Redis has no such sale, SQL has {head.seq} events of it"
    if found.epoch != head.epoch:
        return f"Redis has another epoch of it; SQL ends at event {head.seq}"
    if found.seq < head.seq:
        return (
            f"Redis ends at event {found.seq}, SQL at {head.seq}:"
            f" {head.seq - found.seq} events are lost"
        )
    there = found.chain if found.seq == head.seq else found.chain_there
    if there is not None and head.seq and there != head.chain:
        return f"event {head.seq} is another one in Redis than in SQL"
    return None


class Watch:
    """One process's eye on Redis: what it must be, and what it must still have.

    Args:
        connections: where prepares go, once their server is vouched for.
        restorer: reads the heads of sales.
        ledger: SQL.
        catalog: told which sales are closed.
        vouches: what other processes have compared, for when SQL is away.
        preflight: names what is missing in Redis before holds may be promised.
        preflight_sales: likewise of single sales, but for those that it is given.
    """

    def __init__(
        self,
        connections: Connections,
        restorer: Restorer,
        ledger: Ledger,
        catalog: Catalog,
        vouches: Vouches,
        preflight: Callable[[], Awaitable[Sequence[str]]],
        preflight_sales: Callable[[Collection[str]], Awaitable[Mapping[str, Sequence[str]]]],
    ) -> None:
        self._connections = connections
        self._restorer = restorer
        self._ledger = ledger
        self._catalog = catalog
        self._vouches = vouches
        self._preflight = preflight
        self._preflight_sales = preflight_sales
        self._new_and_missing: set[str] = set()
        #: The life of the server that is vouched for here, and the epochs of SQL's last answer.
        self._vouched: str | None = None
        self._epochs: dict[str, str] = {}
        #: What did not answer the last look, by its name in readiness; empty where all did.
        self.away = ""
        #: Every reason that the metric has named so far.
        self._named: set[str] = set()
        #: What is missing in Redis, by name.
        self.missing: tuple[str, ...] = ()
        #: What is missing of single sales, by name.
        self.missing_of: Mapping[str, Sequence[str]] = {}

    @property
    def gaps(self) -> Mapping[str, str]:
        """Each sale that waits for a rebuild, and what it lacks."""
        return self._catalog.closed

    def check(self, sale_id: str) -> None:
        """Refuse a prepare while Redis, or this sale in it, is not as it must be.

        Raises:
            Unavailable: naming what is missing.
        """
        missing = self.missing or self.missing_of.get(sale_id)
        if missing:
            raise Unavailable(
                f"No holds are taken now: {', '.join(missing)}.",
                retryAfter=RETRY_AFTER_SECONDS,
                missing=list(missing),
            )

    def wake(self) -> None:
        """Look at once: somebody met a sale that is not the one we know."""
        self._connections.doubted.set()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await self.look()
            except Exception as error:  # loop top: who stops looking would sell from anything
                alarm(Alarm.WORKER_BUG, loop="watch", reason=type(error).__name__)
                log.exception("look_broke")
            pause = AWAY_SECONDS if self.away else LOOK_SECONDS
            if not self._connections.vouched:
                pause = HURRY_SECONDS
            try:
                async with asyncio.timeout(pause):
                    await self._connections.doubted.wait()
            except TimeoutError:
                continue
            # Thousands of doubts at once are one look.
            await asyncio.sleep(AGAIN_SECONDS)

    async def look(self) -> None:
        """One look at everything; without effect where Redis does not answer."""
        self._connections.doubted.clear()
        try:
            self._take(tuple(await self._preflight()))
        except (StoreUnavailable, StoreUncertain) as error:
            self._away("redis", error)
            return
        try:
            run_id = await self._compare_all()
            self._take_of_sales(await self._preflight_sales(self._catalog.closed))
        except (StoreUnavailable, StoreUncertain) as error:
            self._away("redis", error)
            return
        except (SQLAlchemyError, OSError) as error:
            await self._do_without_sql(error)
            return
        if run_id is not None:
            self._catalog.go_by(None)
            self._vouch_for(run_id)
            await self._keep_vouch(run_id)
        self._log_if_back()
        self._show_closed()

    async def _do_without_sql(self, error: Exception) -> None:
        """Go on with the sales that were compared in this life of the server, here or elsewhere."""
        try:
            run_id, epochs = await self._vouches.read()
        except (StoreUnavailable, StoreUncertain) as away:
            self._away("redis", away)
            return
        if epochs is not None:
            self._vouch_for(run_id)
        elif run_id != self._vouched:
            # Nobody has compared this life with SQL: what it has may be old.
            self._catalog.go_by({})
            self._away("sql", error)
            return
        self._catalog.go_by(self._epochs if epochs is None else epochs)
        self._log_away("sql", error)
        self._show_closed()

    def _vouch_for(self, run_id: str) -> None:
        self._vouched = run_id
        self._connections.vouch_for(run_id)

    async def _keep_vouch(self, run_id: str) -> None:
        """Let a process that starts while SQL is away sell what was compared just now."""
        whole = {
            sale_id: epoch
            for sale_id, epoch in self._epochs.items()
            if sale_id not in self._catalog.closed and not self.missing_of.get(sale_id)
        }
        try:
            await self._vouches.keep(run_id, whole)
        except (StoreUnavailable, StoreUncertain) as error:
            log.debug("vouch_not_kept", reason=reason_of(error))

    def _away(self, which: str, error: Exception) -> None:
        """Nothing was compared, so what is not vouched for stays closed."""
        self._log_away(which, error)
        self._show_closed(which)

    def _log_away(self, which: str, error: Exception) -> None:
        if which != self.away:
            log.warning("not_compared", away=which, reason=reason_of(error))
        self.away = which

    def _log_if_back(self) -> None:
        if self.away:
            log.info("compared_again", was_away=self.away)
        self.away = ""

    def _show_closed(self, *more: str) -> None:
        """Export why new holds are refused, in this process."""
        reasons = {*self.missing, *more}
        for rows in self.missing_of.values():
            reasons.update(rows)
        if self.gaps:
            reasons.add("sale-recovering")
        self._named |= reasons
        for reason in self._named:
            PREPARE_CLOSED.labels(reason).set(reason in reasons)

    def _take(self, missing: tuple[str, ...]) -> None:
        if missing and missing != self.missing:
            alarm(Alarm.PREFLIGHT, missing=", ".join(missing))
        if self.missing and not missing:
            log.info("preflight_holds")
        self.missing = missing

    def _take_of_sales(self, missing_of: Mapping[str, Sequence[str]]) -> None:
        for sale_id, missing in missing_of.items():
            if missing != self.missing_of.get(sale_id):
                alarm(Alarm.PREFLIGHT_OF_SALE, sale_id=sale_id, missing=", ".join(missing))
        for sale_id in self.missing_of.keys() - missing_of.keys():
            log.info("preflight_of_sale_holds", sale_id=sale_id)
        self.missing_of = missing_of

    async def _compare_all(self) -> str | None:
        """Close what is lost and open what is not; the server, where one and the same answered."""
        run_ids: set[str] = set()
        lost = await self._lost(None, run_ids)
        if lost:
            await asyncio.sleep(AGAIN_SECONDS)
            lost = await self._lost(set(lost), run_ids)
        for sale_id, gap in lost.items():
            if self._catalog.close(sale_id, gap):
                alarm(Alarm.SALE_RECOVERING, sale_id=sale_id, gap=gap)
        for sale_id in set(self._catalog.closed) - set(lost):
            log.info("sale_recovered", sale_id=sale_id)
            self._catalog.reopen(sale_id)
        return run_ids.pop() if len(run_ids) == 1 else None

    async def _lost(self, among: set[str] | None, run_ids: set[str]) -> dict[str, str]:
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
            heads = await self._ledger.heads()
        self._epochs = {sale_id: head.epoch for sale_id, head in heads.items()}
        self._catalog.learn_all(self._epochs)
        sale_ids = [sale_id for sale_id in heads if among is None or sale_id in among]
        lost: dict[str, str] = {}
        missing: set[str] = set()
        for start in range(0, max(1, len(sale_ids)), SALES_AT_ONCE):
            some = sale_ids[start : start + SALES_AT_ONCE]
            run_id, found = await self._restorer.look_at(
                {sale_id: heads[sale_id].seq for sale_id in some}
            )
            run_ids.add(run_id)
            for sale_id in some:
                gap = compare(heads[sale_id], found[sale_id])
                if gap is None:
                    continue
                if found[sale_id] is None and heads[sale_id].seq == 0:
                    missing.add(sale_id)
                    # Being made right now, unless the last look found it so too.
                    if sale_id not in self._new_and_missing:
                        continue
                lost[sale_id] = gap
        if among is None:
            self._new_and_missing = missing
        return lost
