"""The workers' shares of the sales, on lists of beats that the test writes."""

import random
from collections.abc import Iterable

import pytest

from reservation.adapters.redis.worker_registry import WorkerEntry
from reservation.workers.sharing import SAME_BEATS_MAX, Duty, Share

SALES = [f"sale-{number}" for number in range(100)]
#: Reads within which every worker must have detected a loss.
READS_MAX = SAME_BEATS_MAX + 1


class World:
    """Workers that beat and read in turn, one read each per step."""

    def __init__(self, *names: str) -> None:
        self.entries: dict[str, WorkerEntry] = {}
        self.shares = {name: Share(name) for name in names}
        #: Workers that run. A frozen one keeps its share and neither beats nor reads.
        self.running = set(names)
        self.unable: dict[str, tuple[str, ...]] = {}
        self._beats = 0

    def step(self, order: Iterable[str] = ()) -> None:
        for name in order or sorted(self.running):
            self._beats += 1
            self.entries[name] = WorkerEntry(beat=self._beats, unable=self.unable.get(name, ()))
            share = self.shares[name]
            share.observe(dict(self.entries))
            for gone in share.gone:
                del self.entries[gone]

    def steps(self, count: int = READS_MAX) -> None:
        for _ in range(count):
            self.step()

    def servers(self, duty: Duty, sale_id: str) -> list[str]:
        """The running workers that perform the duty for a sale."""
        return [name for name in sorted(self.running) if self.shares[name].has(duty, sale_id)]

    def assert_each_served_once(self) -> None:
        for duty in Duty:
            for sale_id in SALES:
                assert len(self.servers(duty, sale_id)) == 1, (duty, sale_id)


def test_a_lone_worker_has_all_sales_before_its_first_read() -> None:
    share = Share("a")
    assert share.of(SALES) == SALES
    assert not share.observe({"a": WorkerEntry(beat=1)})


def test_two_workers_have_about_half_of_the_sales_each() -> None:
    world = World("a", "b")
    world.steps(2)
    world.assert_each_served_once()
    counts = [len(share.of(SALES)) for share in world.shares.values()]
    assert sum(counts) == len(SALES)
    assert min(counts) >= 35


def test_a_new_worker_takes_sales_and_moves_none_between_the_others() -> None:
    world = World("a", "b", "c")
    world.running = {"a", "b"}
    world.steps()
    before = {sale_id: world.servers(Duty.EXPIRE, sale_id) for sale_id in SALES}
    world.running.add("c")
    world.steps()
    world.assert_each_served_once()
    moved = {
        sale_id
        for sale_id in SALES
        if world.servers(Duty.EXPIRE, sale_id) not in (before[sale_id], ["c"])
    }
    assert moved == set()
    assert len(world.shares["c"].of(SALES)) >= 20


@pytest.mark.parametrize("lost", ["a", "b", "c"])
def test_the_sales_of_a_lost_worker_are_served_after_four_reads(lost: str) -> None:
    world = World("a", "b", "c")
    world.steps()
    world.running.remove(lost)
    world.steps(READS_MAX)
    world.assert_each_served_once()
    assert lost not in world.entries


def test_a_worker_that_left_is_replaced_at_the_next_read() -> None:
    world = World("a", "b")
    world.steps()
    world.running.remove("b")
    del world.entries["b"]
    world.step()
    world.assert_each_served_once()


def test_a_frozen_worker_that_resumes_serves_its_sales_again() -> None:
    world = World("a", "b")
    world.steps()
    own = world.shares["b"].of(SALES)
    world.running.remove("b")
    world.steps()
    assert world.shares["a"].of(SALES) == SALES
    world.running.add("b")
    world.steps(2)
    world.assert_each_served_once()
    assert world.shares["b"].of(SALES) == own


def test_a_pause_of_the_reader_makes_no_other_worker_count_as_gone() -> None:
    """Between two reads of it any time may pass."""
    world = World("a", "b")
    world.steps()
    for _ in range(20):
        world.step(order=["b"])
    world.step(order=["a", "b"])
    assert world.shares["a"].workers == ("a", "b")
    world.assert_each_served_once()


def test_an_entry_of_an_ended_worker_is_removed_by_its_successor() -> None:
    """After SIGKILL to the only worker, its entry is all that is left."""
    world = World("new")
    world.entries["old"] = WorkerEntry(beat=10**15)
    world.steps()
    assert world.shares["new"].of(SALES) == SALES
    assert set(world.entries) == {"new"}


def test_the_holds_of_a_worker_with_a_wrong_clock_are_expired_by_another() -> None:
    world = World("a", "b")
    world.steps()
    world.unable["b"] = (Duty.EXPIRE,)
    world.steps(2)
    world.assert_each_served_once()
    assert all(world.servers(Duty.EXPIRE, sale_id) == ["a"] for sale_id in SALES)
    assert any(world.servers(Duty.WRITE, sale_id) == ["b"] for sale_id in SALES)
    del world.unable["b"]
    world.steps(2)
    world.assert_each_served_once()
    assert any(world.servers(Duty.EXPIRE, sale_id) == ["b"] for sale_id in SALES)


def test_a_duty_that_no_worker_can_perform_stays_shared() -> None:
    world = World("a", "b")
    world.unable = {"a": (Duty.WRITE,), "b": (Duty.WRITE,)}
    world.steps()
    world.assert_each_served_once()


def test_an_unknown_duty_of_a_later_release_is_ignored() -> None:
    world = World("a", "b")
    world.unable["b"] = ("dance",)
    world.steps()
    world.assert_each_served_once()


@pytest.mark.parametrize("seed", range(200))
def test_every_sale_is_served_four_reads_after_any_change(seed: int) -> None:
    """Workers are killed, frozen and started in any order, and read in any order."""
    chance = random.Random(seed)
    names = [f"host-{number}" for number in range(5)]
    world = World(*names)
    world.running = {names[0]}
    for _ in range(10):
        for name in names:
            if chance.random() < 0.3:
                world.running.symmetric_difference_update({name})
            if chance.random() < 0.2:
                world.unable[name] = tuple(chance.sample(list(Duty), chance.randint(0, 2)))
        world.running = world.running or {chance.choice(names)}
        # A process that starts under an earlier name has no state of it.
        for name in world.running:
            if chance.random() < 0.2:
                world.shares[name] = Share(name)
        for _ in range(READS_MAX):
            world.step(order=chance.sample(sorted(world.running), len(world.running)))
        for duty in Duty:
            for sale_id in SALES[:10]:
                assert world.servers(duty, sale_id), (duty, sale_id)
        world.steps(2)
        world.assert_each_served_once()
