"""Workload: some hundred payments of one sale, from prepare until each has ended."""

import random
import secrets
from typing import Any, Final

from reservation.application.payments.refunds import RefundWish
from reservation.application.reservations.prepare import wish_of
from reservation.domain.sale import Item
from reservation.domain.states import Status
from reservation.failpoints import POINTS
from reservation.sandbox.faults import Fault
from reservation.workers.reaper import Reaper
from reservation.workers.refunder import Refunder
from tests.faults.payments.environment import AtOnce, Story, World, deaths_of
from tests.faults.payments.matrix import NONE, Entry, Kind, Plan

__all__ = ["Wave"]

#: Each basket has some of the first and one of the second.
PRICES: Final = {"a": 1_000, "b": 700}
SPARE: Final = 5
HOLD_SECONDS: Final = 300
#: A late buyer's hold is over by then, and the PG still lets the payment be confirmed.
LATE_SECONDS: Final = HOLD_SECONDS + 30
#: After this long everything must have ended: the limit of decision 5 of the design for the
#: slowest, after the longest outage, twice over.
GIVE_UP_SECONDS: Final = 3_600
#: Steps of the clock in which nothing can happen, between these.
STEP_LEAST: Final = 1.0
STEP_MOST: Final = 20.0
#: Retries of a patient buyer, and repeats of a webhook.
NUDGE_SECONDS: Final = 20
#: One in this many confirmed orders is refunded at the end.
REFUNDED_OF: Final = 8
REFUND_ROUNDS_MAX: Final = 20
#: Of faults that take time, and until the PG's outage ends: longer than any wave.
LINGER_SECONDS: Final = 600
LINGERING: Final = (Fault.HANG, Fault.SLOW_DRIP)
#: The settler retries the confirm only so long, so a planned event must come before.
CONFIRM_AGAIN_SECONDS: Final = 480

_ENDED: Final = (Status.CONFIRMED, Status.RELEASED, Status.EXPIRED, Status.REFUNDED)
_at_once = AtOnce()


class Wave:
    """One sale, its payments, and the PG's outages."""

    def __init__(
        self,
        world: World,
        plans: list[Plan],
        *,
        outage_seconds: float,
        rate: float = 0.0,
        refunds: bool = True,
        draw: random.Random,
    ) -> None:
        self._world = world
        self._plans = plans
        self._outage_seconds = outage_seconds
        self._rate = rate
        self._with_refunds = refunds
        self._draw = draw
        self.sale_id = ""
        self.stories: list[Story] = []
        self._began_ms = 0

    async def run(self) -> None:
        """From the first prepare to the last refund."""
        self._began_ms = self._world.clock.now_ms()
        await self._open()
        await _at_once(self._prepare(plan) for plan in self._plans)
        await _at_once(self._order_faults(story) for story in self.stories)
        await self._order_faults_by_rate()
        await _at_once(self._first(story) for story in self.stories if not _is_late(story))
        await self._world.quiet()
        await self._query_reservation()
        await self._until_all_ended()
        await self._note_met()
        await self._world.post("/_faults", {"clear": True})
        if self._with_refunds:
            await self._refunds()
        await self._world.bench.flush(self.sale_id)

    def totals(self) -> dict[str, int]:
        """The units of each item in the sale: refunds without restock reduce them."""
        pieces = sum(plan.quantity for plan in self._plans)
        gone = [s.plan.quantity for s in self.stories if not s.restocked]
        return {
            "a": pieces + SPARE - sum(gone),
            "b": len(self._plans) + SPARE - len(gone),
        }

    async def _open(self) -> None:
        self.sale_id = await self._world.bench.sale(
            hold_seconds=HOLD_SECONDS,
            items=tuple(
                Item(sku=sku, name=sku, price=PRICES[sku], total=total, limit_per_buyer=10)
                for sku, total in self.totals().items()
            ),
        )

    async def _prepare(self, plan: Plan) -> None:
        amount = PRICES["a"] * plan.quantity + PRICES["b"]
        known = await self._world.first.catalog.get(self.sale_id)
        wish = wish_of(known.sale, [("a", plan.quantity), ("b", 1)], amount)
        buyer = f"buyer-{secrets.token_hex(6)}"
        order = (
            await self._world.first.preparation.prepare(known, buyer, "once", wish)
        ).reservation
        payment_key = f"tboxforged{secrets.token_hex(8)}"
        if plan.kind is not Kind.FORGED:
            body: dict[str, Any] = {"orderId": order.order_id, "amount": amount}
            if plan.kind is Kind.DECLINED:
                body["decline"] = "REJECT_CARD_COMPANY"
            if plan.kind is Kind.ACCOUNT:
                body["method"] = "virtual_account"
            payment_key = (await self._world.post("/_payments", body))["paymentKey"]
        story = Story(plan, order, payment_key, deaths_of(plan))
        story.well_at = self._well_at(plan)
        self.stories.append(story)
        self._world.stories[order.order_id] = story
        # Where the PG acts without our call, its own webhook is dropped, and repeats of it come.
        if plan.cell.entry is Entry.WEBHOOK or plan.cell.fault == Fault.WEBHOOK_STORM:
            self._world.hooks.acknowledged.add(order.order_id)

    def _well_at(self, plan: Plan) -> int:
        hangs = plan.cell.fault == Fault.HANG
        lasts = self._lasts(plan) or hangs or self._rate > 0
        return self._began_ms + round(self._outage_seconds * 1000) if lasts else 0

    def _lasts(self, plan: Plan) -> bool:
        too_long = self._outage_seconds >= CONFIRM_AGAIN_SECONDS
        return plan.outage and not (too_long and plan.cell.moment == "settle:after_intent")

    async def _order_faults(self, story: Story) -> None:
        plan = story.plan
        if plan.cell.fault == NONE:
            return
        wish: dict[str, Any] = {
            "fault": plan.cell.fault,
            "orderId": story.order.order_id,
            "seconds": LINGER_SECONDS,
        }
        if self._lasts(plan):
            lingers = plan.cell.fault in LINGERING
            wish["operations"] = ["confirm", "cancel"] + ([] if lingers else ["look_up"])
        else:
            wish["times"] = 1
        await self._world.post("/_faults", wish)

    async def _order_faults_by_rate(self) -> None:
        if not self._rate:
            return
        each = 1 - (1 - self._rate) ** (1 / len(Fault))
        for fault in Fault:
            wish = {
                "fault": fault,
                "rate": each,
                "seed": self._draw.randrange(1 << 30),
                "operations": ["confirm", "cancel"] + ([] if fault in LINGERING else ["look_up"]),
                "seconds": LINGER_SECONDS,
            }
            await self._world.post("/_faults", wish)

    async def _first(self, story: Story) -> None:
        """The buyer is back: at the first process, and perhaps at the second one as well."""
        world = self._world
        await world.in_first(story, world.open_success_url(world.first, story))
        if story.plan.cell.entry is Entry.SUCCESS:
            await world.in_second(world.open_success_url(world.second, story))

    async def _until_all_ended(self) -> None:
        ill = True
        while any(not story.ended_at for story in self.stories):
            now = self._world.clock.now_ms()
            assert now < self._began_ms + GIVE_UP_SECONDS * 1000, self._unended()
            if ill and now >= self._began_ms + self._outage_seconds * 1000:
                ill = False
                await self._recover()
            await self._tick()
            await self._world.clock.turn(await self._step(ill=ill))

    async def _recover(self) -> None:
        """The PG's outage ends, but for single faults that were ordered and did not occur yet."""
        await self._note_met()
        await self._world.post("/_faults", {"clear": True})
        await _at_once(
            self._order_faults(story)
            for story in self.stories
            if not (story.met or story.ended_at or story.well_at)
        )

    def _unended(self) -> str:
        open_stories = [(s.order.order_id, s.plan) for s in self.stories if not s.ended_at]
        return f"{len(open_stories)} payments have not ended, the first: {open_stories[:3]}"

    async def _step(self, *, ill: bool) -> float:
        """Seconds from now in which nothing can happen."""
        now = self._world.clock.now_ms()
        store = self._world.second.store
        moments = [
            *(await store.first_leases(self.sale_id, 1)).values(),
            *(await store.first_deadlines(self.sale_id, 1)).values(),
            *([self._began_ms + round(self._outage_seconds * 1000)] if ill else []),
        ]
        seconds = (min(moments, default=now) - now) / 1000
        return min(STEP_MOST, max(STEP_LEAST, seconds))

    async def _tick(self) -> None:
        """Run every step that is due now."""
        world = self._world
        due = set(await world.second.store.leases_over(self.sale_id, len(self.stories)))
        steps = [
            step
            for story in self.stories
            if not story.ended_at and (step := self._next(story, story.order.order_id in due))
        ]
        await _at_once(steps)
        await Reaper(world.second.catalog, world.second.store).run_once(self.sale_id)
        await world.quiet()
        await self._query_reservation()

    def _next(self, story: Story, due: bool) -> Any:
        """The payment's next step, if any."""
        world, order_id = self._world, story.order.order_id
        entry = story.plan.cell.entry
        if _is_late(story) and not story.claimed_at:
            return self._late(story)
        if story.plan.kind is Kind.BEHIND:
            return self._repeat(story) if self._nudges(story) else None
        if due and story.deaths:
            return world.in_first(story, world.first.settlement.settle(order_id))
        if entry is Entry.WEBHOOK and (due or self._nudges(story)):
            return world.in_second(world.second.notifications.receive(order_id, story.payment_key))
        if entry is Entry.REFRESH and not story.deaths and (due or self._nudges(story)):
            return self._refresh(story, due)
        return world.in_second(world.second.settlement.settle(order_id)) if due else None

    def _late(self, story: Story) -> Any:
        """The buyer, or the PG, comes after the hold's end."""
        late_ms = LATE_SECONDS * 1000
        if story.plan.kind is Kind.BEHIND:
            # Its faults are ordered for it alone, when the outage is over.
            late_ms = max(late_ms, round(self._outage_seconds * 1000) + 1)
        if self._world.clock.now_ms() < self._began_ms + late_ms:
            return None
        return self._behind(story) if story.plan.kind is Kind.BEHIND else self._first(story)

    async def _behind(self, story: Story) -> None:
        """The PG approves it, and our next two calls to the PG fail."""
        story.claimed_at = self._world.clock.now_ms()
        order = story.order
        # An answer for another order looks like a forged webhook: the PG does not repeat it.
        notify_again = set(Fault) - set(LINGERING) - {Fault.OTHER_ORDER}
        fault = self._draw.choice(sorted(notify_again))
        wish = {"fault": fault, "orderId": order.order_id, "times": 2}
        await self._world.post("/_faults", wish | {"operations": ["look_up", "cancel"]})
        await self._world.approve(story.payment_key, order)

    async def _repeat(self, story: Story) -> None:
        """A repeat of its webhook, until one is accepted."""
        story.acknowledged = await self._world.deliver_webhook(
            story.order.order_id, story.payment_key
        )

    def _nudges(self, story: Story) -> bool:
        """Whether it is time for the buyer to load the page again, or for a webhook to repeat."""
        now = self._world.clock.now_ms()
        if now < story.nudged_at + NUDGE_SECONDS * 1000:
            return False
        story.nudged_at = now
        return True

    async def _refresh(self, story: Story, due: bool) -> None:
        world = self._world
        await world.in_second(world.open_success_url(world.second, story))
        if due:
            await world.in_second(world.second.settlement.settle(story.order.order_id))

    async def _query_reservation(self) -> None:
        """Record the status of each payment."""
        open_ones = [story for story in self.stories if not story.ended_at]
        found = await self._world.second.store.read_many([s.order.order_id for s in open_ones])
        for story, order in zip(open_ones, found, strict=True):
            assert order is not None
            story.status = order.status.value
            story.unknown = story.unknown or order.status is Status.CONFIRMING
            if story.lease_left:
                story.lease_left = False
                story.free_at = await self._world.second.store.lease_end(story.order) or 0
            waits = _is_late(story) and not (story.claimed_at and _is_acknowledged(story))
            if order.status in _ENDED and not waits:
                story.ended_at = self._world.clock.now_ms()
                story.ended_as = story.status

    async def _note_met(self) -> None:
        rules = (await self._world.pg.get("/_faults")).raise_for_status().json()["faults"]
        for rule in rules:
            story = self._world.stories.get(rule["orderId"] or "")
            if story is not None and rule["applied"]:
                story.met = True

    async def _refunds(self) -> None:
        """An operator refunds some orders: with the fault they had, and deaths on the way."""
        world = self._world
        confirmed = [story for story in self.stories if story.status == Status.CONFIRMED]
        chosen = [story for story in confirmed if self._draw.randrange(REFUNDED_OF) == 0]
        for story in chosen:
            story.restocked = self._draw.random() < 0.7
            story.deaths = self._draw.choice(
                [[], *([point] for point in POINTS if point.startswith("refund:"))]
            )
            if story.plan.cell.fault != NONE and story.plan.cell.fault not in LINGERING:
                fault = {"fault": story.plan.cell.fault, "orderId": story.order.order_id}
                await world.post("/_faults", fault | {"times": 1, "operations": ["cancel"]})
        await _at_once(self._refund(story) for story in chosen)
        second = world.second
        refunder = Refunder(second.sql, second.refunds, clock=world.clock)
        for _ in range(REFUND_ROUNDS_MAX):
            await refunder.run_once()
            if not await world.second.sql.refunds.list_pending(1):
                break
            await world.clock.turn(STEP_MOST)

    async def _refund(self, story: Story) -> None:
        wish = RefundWish(
            order_id=story.order.order_id,
            reason="a test",
            restock=story.restocked,
            account=None,
            idempotency_key=secrets.token_hex(8),
            operator="op",
        )
        await self._world.in_first(story, self._world.first.refunds.refund(wish))


def _is_late(story: Story) -> bool:
    return story.plan.kind in (Kind.LATE, Kind.BEHIND)


def _is_acknowledged(story: Story) -> bool:
    return story.acknowledged or story.plan.kind is Kind.LATE
