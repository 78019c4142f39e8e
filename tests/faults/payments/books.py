"""Books of a run: the PG's money against our orders, and the run's history."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from reservation.domain.states import Status
from tests.faults.payments.environment import LIMITS, Story, World
from tests.faults.payments.matrix import CELLS, FAULTS, MOMENTS, NONE, Cell, Entry, Kind
from tests.faults.payments.workload import Wave

__all__ = ["Report", "check"]

#: The promises of decision 5 of the design.
SETTLED_SECONDS: Final = 60.0
REST_SECONDS: Final = 13 * 60.0
_ENTRIES: Final = tuple(Entry)
_SHARES: Final = (0.5, 0.9, 0.99)


async def check(world: World, waves: Sequence[Wave]) -> list[str]:
    """Findings, in sentences; empty if every won is where it belongs."""
    wrong = [problem for wave in waves for problem in await _check_sale(world, wave)]
    stories = [story for wave in waves for story in wave.stories]
    ledger = world.sandbox.ledger()
    charged, cancelled = Counter[str](), Counter[str]()
    times: Counter[str] = Counter()
    for entry in ledger["entries"]:
        if entry["kind"] == "cancel":
            cancelled[entry["orderId"]] += entry["amount"]
        else:
            charged[entry["orderId"]] += entry["amount"]
            times[entry["orderId"]] += 1
    sold = 0
    for story in stories:
        order_id = story.order.order_id
        owed = story.order.amount if story.status == Status.CONFIRMED else 0
        sold += owed
        at_pg = charged[order_id] - cancelled[order_id]
        if at_pg != owed:
            listed = "".join(f"\n    {line}" for line in await _history(world, order_id))
            wrong.append(
                f"{order_id} is {story.status} and the PG has {at_pg} of it: {story.plan}{listed}"
            )
        if times[order_id] > 1:
            wrong.append(f"{order_id} was charged {times[order_id]} times: {story.plan}")
    if ledger["charged"] - ledger["cancelled"] != sold:
        wrong.append(f"the PG has {ledger['charged']} - {ledger['cancelled']}, we sold {sold}")
    return wrong


async def _history(world: World, order_id: str) -> list[str]:
    """The history of an order: its events, and each answer of the PG."""
    rows = await world.second.sql.orders.history(order_id)
    began = rows[0].at_ms if rows else 0
    return [f"{(row.at_ms - began) / 1000:8.1f} {row.kind} {row.what} {row.facts}" for row in rows]


async def _check_sale(world: World, wave: Wave) -> list[str]:
    report = await world.second.audit.run(wave.sale_id)
    wrong = [f"{wave.sale_id}: {problem}" for problem in report.problems]
    if report.lag:
        wrong.append(f"{wave.sale_id}: SQL is {report.lag} events behind")
    orders = await world.second.store.read_many([s.order.order_id for s in wave.stories])
    sold, total = Counter[str](), wave.totals()
    for story, order in zip(wave.stories, orders, strict=True):
        assert order is not None
        story.status = order.status.value
        for line in order.lines:
            if order.status is Status.CONFIRMED:
                sold[line.sku] += line.quantity
        if order.status in (Status.CONFIRMING, Status.HELD, Status.PREPARED):
            wrong.append(f"{order.order_id} is still {order.status}: {story.plan}")
    for sku in report.skus:
        current_status = (sku.total, sku.available + sku.held + sku.sold, sku.held, sku.sold)
        if current_status != (total[sku.sku], total[sku.sku], 0, sold[sku.sku]):
            wrong.append(
                f"{wave.sale_id}/{sku.sku}: {current_status}, sold by orders {sold[sku.sku]}"
            )
    return wrong


class Report:
    """The record of a run: counts of each cell, and how long unknown payments took."""

    def __init__(self, stories: Sequence[Story]) -> None:
        self._stories = stories
        self.cells: Counter[Cell] = Counter(s.plan.cell for s in stories if happened(s))
        self.moved, self.rest = settle_times(stories)
        #: From the buyer's return, including the PG's outage and the leases of dead processes.
        self.whole = sorted((s.ended_at - s.claimed_at) / 1000 for s in stories if s.unknown)

    def empty(self) -> list[Cell]:
        """Cells without a payment."""
        return [cell for cell in CELLS if not self.cells[cell]]

    def missed(self) -> list[str]:
        """The actual course of payments in empty cells, in sentences."""
        empty = set(self.empty())
        return [
            f"missed: {s.plan}: died at {s.died_at}, the fault {'met' if s.met else 'missed'} it, "
            f"{s.ended_as} after {(s.ended_at - s.claimed_at) / 1000:.1f} s"
            for s in self._stories
            if s.plan.cell in empty
        ]

    def late(self) -> list[str]:
        """Payments that took longer than is promised."""
        wrong: list[str] = []
        if self.moved and quantile(self.moved, 0.99) > SETTLED_SECONDS:
            wrong.append(f"p99 is {quantile(self.moved, 0.99):.0f} s")
        if self.rest and self.rest[-1] > REST_SECONDS:
            wrong.append(f"the rest took up to {self.rest[-1]:.0f} s")
        return wrong

    def text(self) -> str:
        """All of it, for people."""
        return "\n".join([*self._table(), *self._pairs(), *self._ends(), *self._times()])

    def _table(self) -> Iterable[str]:
        yield ""
        yield "Payments of each cell: fault x moment of death x who goes on. A payment counts where"
        yield "the death happened, and the fault met a call of it (where any call is made at all)."
        yield "Each field: " + "/".join(_ENTRIES)
        for number, moment in enumerate(MOMENTS):
            yield f"  {number:2} {moment}"
        yield f"{'fault':20}" + "".join(f"{number:>12}" for number in range(len(MOMENTS)))
        for fault in FAULTS:
            fields = (
                "/".join(str(self.cells[Cell(fault, moment, entry)]) for entry in _ENTRIES)
                for moment in MOMENTS
            )
            yield f"{fault:20}" + "".join(f"{field:>12}" for field in fields)

    def _pairs(self) -> Iterable[str]:
        def row(name: str, counts: Callable[[Cell], bool]) -> str:
            found = [
                sum(n for cell, n in self.cells.items() if counts(cell) and cell.entry is entry)
                for entry in _ENTRIES
            ]
            return f"{name:28}" + "".join(f"{count:>10}" for count in found)

        yield ""
        yield f"{'pairs':28}" + "".join(f"{entry:>10}" for entry in _ENTRIES)
        for fault in FAULTS:
            yield row(fault, lambda cell, fault=fault: cell.fault == fault)
        for moment in MOMENTS:
            yield row(moment, lambda cell, moment=moment: cell.moment == moment)

    def _ends(self) -> Iterable[str]:
        yield ""
        yield f"payments {len(self._stories)}, cells {len(CELLS)}, empty {len(self.empty())}"
        for kind in Kind:
            ends = Counter(s.status for s in self._stories if s.plan.kind is kind)
            if ends:
                yield f"  {kind:10}" + ", ".join(f"{s} {n}" for s, n in sorted(ends.items()))

    def _times(self) -> Iterable[str]:
        yield ""
        yield "Unknown payments, seconds of the world's clock from when the PG answers again and no"
        yield "dead process' lease stands to the end; and all of them from the buyer's return:"
        listed = {
            "moved or again": self.moved,
            "the rest": self.rest,
            "from the return": self.whole,
        }
        for name, times in listed.items():
            if times:
                shown = " ".join(f"p{q * 100:.0f} {quantile(times, q):.1f}" for q in _SHARES)
                yield f"  {name:16} {len(times):6} payments  {shown} max {times[-1]:.1f}"


def happened(story: Story) -> bool:
    """Whether the payment took the course of its cell."""
    plan = story.plan
    died = plan.cell.moment in (NONE, *story.died_at)
    return died and (plan.cell.fault == NONE or story.met or not plan.cell.calls)


def settle_times(stories: Sequence[Story]) -> tuple[list[float], list[float]]:
    """Sorted: of payments whose money moved or that can be confirmed again, and of the rest."""
    moved: list[float] = []
    rest: list[float] = []
    for story in stories:
        if not story.unknown:
            continue
        begins = max(story.well_at, story.free_at, story.claimed_at)
        seconds = max(0, story.ended_at - begins) / 1000
        again = begins - story.claimed_at < LIMITS.confirm_again_seconds * 1000
        sold = story.ended_as in (Status.CONFIRMED, Status.REFUNDED)
        (moved if sold or (again and story.plan.kind is not Kind.FORGED) else rest).append(seconds)
    return sorted(moved), sorted(rest)


def quantile(times: Sequence[float], share: float) -> float:
    """The value at this share of the sorted times."""
    return times[min(len(times) - 1, int(share * len(times)))]


def listed(problems: Sequence[Any], most: int = 20) -> str:
    """The first of them, one a line."""
    return "\n".join(str(problem) for problem in problems[:most])
