"""The parts of one running sandbox, opened and closed in order."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import structlog

from reservation.domain.clock import Clock, SystemClock
from reservation.sandbox.config import SandboxConfig
from reservation.sandbox.faults import Faults
from reservation.sandbox.journal import Journal
from reservation.sandbox.ledger import Ledger
from reservation.sandbox.webhooks import Webhooks

__all__ = ["AdjustableClock", "Sandbox"]

log = structlog.get_logger(__name__)

#: Interval of the scan for due payments, so that their webhook comes by itself.
_LAPSE_SECONDS = 1.0


class AdjustableClock:
    """The machine's clock with a forward offset. It never goes back."""

    def __init__(self, base: Clock) -> None:
        self._base = base
        self.offset_ms = 0

    def now_ms(self) -> int:
        return self._base.now_ms() + self.offset_ms

    def monotonic(self) -> float:
        return self._base.monotonic() + self.offset_ms / 1000


class Sandbox:
    """State shared by the endpoints. `running` opens it; before and after there is no ledger."""

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        self.clock = AdjustableClock(SystemClock())
        self.faults = Faults()
        self.webhooks = Webhooks(config.webhook_urls, self.clock, scale=config.webhook_scale)
        self._ledger: Ledger | None = None

    @property
    def ledger(self) -> Ledger:
        if self._ledger is None:
            raise RuntimeError("the sandbox is not running")
        return self._ledger

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Reload the journal, then serve until the block ends."""
        journal = Journal(self.config.journal_dir)
        try:
            ledger = Ledger(journal, self.clock, self.webhooks.publish)
            self.clock.offset_ms = ledger.reload()
            self._ledger = ledger
            async with self.webhooks.sending(), asyncio.TaskGroup() as tasks:
                lapsing = tasks.create_task(self._lapse())
                try:
                    yield
                finally:
                    lapsing.cancel()
        finally:
            self._ledger = None
            journal.close()

    def turn_clock(self, advance_ms: int) -> None:
        """Advance the clock, with all expiries that this causes."""
        offset_ms = self.clock.offset_ms + advance_ms
        self.ledger.note_clock(offset_ms)
        self.clock.offset_ms = offset_ms
        self.ledger.lapse_due()

    async def _lapse(self) -> None:
        while True:
            await asyncio.sleep(_LAPSE_SECONDS)
            try:
                self.ledger.lapse_due()
            except OSError:  # The journal took nothing, so nothing lapsed: the next round tries.
                log.exception("sandbox_journal_failed")
