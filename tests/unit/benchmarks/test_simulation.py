"""Simulation of a sale on many machines: conservation, bounds by the parts, and repeats."""

import msgspec
import pytest

from benchmarks.beyond.simulation import Costs, Crowd, Fleet, Outcome, simulate

COSTS = Costs(
    api_hold=40e-6,
    api_refusal=30e-6,
    api_shed=10e-6,
    redis_call=100e-6,
    redis_hold=25e-6,
    redis_refusal=10e-6,
    sync=0.2e-3,
    round_trip=0.2e-3,
)
SECOND = Crowd(buyers=3_000, arrival_seconds=1.0, stock=1_000)


def rate(costs: Costs, connections: int, *, processes: int = 1, servers: int = 1) -> float:
    """Holds a second of buyers who are replaced as soon as they are answered."""
    crowd = Crowd(buyers=connections, stock=10**9, replaced_until=1.0)
    outcome = simulate(costs, Fleet(processes, servers), crowd)
    return outcome.held / outcome.ended_at


@pytest.mark.parametrize("fleet", [Fleet(1, 1), Fleet(4, 1), Fleet(3, 4)])
@pytest.mark.parametrize("stock", [0, 1, 1_000, 5_000])
def test_each_buyer_is_answered_once_and_each_piece_is_held_once(fleet: Fleet, stock: int) -> None:
    outcome = simulate(COSTS, fleet, msgspec.structs.replace(SECOND, stock=stock))
    assert outcome.held + outcome.sold_out == len(outcome.waits) == 3_000
    if fleet.servers == 1:
        assert outcome.held == min(stock, 3_000)
    assert outcome.held <= stock


def test_a_seed_repeats_a_run_and_another_seed_does_not() -> None:
    runs = [simulate(COSTS, Fleet(3, 2), SECOND, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_a_saturated_process_bounds_the_rate() -> None:
    slow = msgspec.structs.replace(COSTS, api_hold=1e-3)
    assert 0.9 * 1_000 < rate(slow, 256) <= 1_000
    assert 1.8 * 1_000 < rate(slow, 512, processes=2) <= 2_000


def test_a_saturated_server_bounds_the_rate_until_there_are_more_partitions() -> None:
    slow = msgspec.structs.replace(COSTS, redis_hold=1e-3)
    assert 0.9 * 1_000 < rate(slow, 256, processes=4) <= 1_000
    assert rate(slow, 512, processes=4, servers=2) > 1.7 * 1_000


def test_the_calls_of_all_processes_share_a_sync() -> None:
    disk = msgspec.structs.replace(COSTS, sync=0.1, api_hold=1e-6, redis_hold=1e-6)
    alone, together = rate(disk, 128), rate(disk, 512, processes=4)
    assert alone < 128 / 0.1
    assert together > 2 * alone


def test_buyers_beyond_the_queue_are_shed_and_answered_later() -> None:
    slow = msgspec.structs.replace(COSTS, redis_hold=2e-3, redis_refusal=0.1e-3)
    outcome = simulate(slow, Fleet(1, 1), SECOND)
    assert outcome.shed > 0
    assert len(outcome.waits) == 3_000
    assert outcome.ended_at > 2.0


def test_a_wait_is_that_of_the_slowest_buyer_in_the_share() -> None:
    outcome = Outcome(waits=[3.0, 1.0, 2.0, 4.0])
    assert [outcome.wait(share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 3.0, 4.0, 4.0]
