"""The bound on open connections: idle connections give way to new ones."""

import resource
from typing import Any

import pytest
import structlog
from structlog.testing import LogCapture

from api.http.connection import connections as module
from api.http.connection.connections import CONNECTIONS_MAX, WARNING_SECONDS, Connections, limit_of


class Connection:
    """Idle until this instant; None while a request is being answered."""

    def __init__(self, open_ones: Connections, waits_until: float | None) -> None:
        self.waits_until = waits_until
        self.gave_way = False
        self._open = open_ones

    def give_way(self) -> None:
        self.gave_way = True
        self._open.discard(self)


@pytest.fixture
def now() -> list[float]:
    return [1_000.0]


@pytest.fixture
def full(now: list[float]) -> Connections:
    return Connections(limit=10, clock=lambda: now[0])


def filled(full: Connections, *waits: float | None) -> list[Connection]:
    made = [Connection(full, until) for until in waits]
    assert all(full.admit(each) for each in made)
    return made


def test_the_connection_closest_to_its_timeout_is_closed_first(full: Connections) -> None:
    made = filled(full, 75.0, 20.0, None, 74.0, 19.0, None, 73.0, 72.0, 71.0, 70.0)
    newcomer = Connection(full, 20.0)
    assert full.admit(newcomer)
    assert [each.gave_way for each in made] == [number == 4 for number in range(10)]
    assert len(full) == 10


def test_a_connection_with_a_running_request_is_kept(full: Connections) -> None:
    made = filled(full, *[None] * 10)
    assert not full.admit(Connection(full, 20.0))
    assert not any(each.gave_way for each in made)
    full.discard(made[0])
    assert full.admit(Connection(full, 20.0))


def test_readiness_warns_during_and_shortly_after_a_flood(
    full: Connections, now: list[float]
) -> None:
    made = filled(full, *[None] * 8)
    assert full.warnings() == []
    made += filled(full, None)
    assert full.warnings() == ["connections-full"]
    made += filled(full, None)
    assert not full.admit(Connection(full, 20.0))
    for each in made:
        full.discard(each)
    assert full.warnings() == ["connections-full"]
    now[0] += WARNING_SECONDS
    assert full.warnings() == []


def test_a_connection_flood_logs_one_line_per_second(
    full: Connections, now: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = LogCapture()
    monkeypatch.setattr(module, "log", structlog.wrap_logger(None, processors=[captured]))
    filled(full, *[None] * 10)
    for _ in range(100):
        assert not full.admit(Connection(full, 20.0))
    now[0] += 1
    assert not full.admit(Connection(full, 20.0))
    lines: list[Any] = captured.entries
    assert [(line["refused"], line["suppressed"]) for line in lines] == [(True, 0), (True, 99)]


@pytest.mark.parametrize(
    ("descriptors", "limit"),
    [
        (64, 16),
        (256, 64),
        (1_024, 640),
        (4_096, 3_712),
        (1_048_576, CONNECTIONS_MAX),
        (resource.RLIM_INFINITY, CONNECTIONS_MAX),
    ],
)
def test_the_connection_limit_reserves_files_for_redis_and_sql(
    descriptors: int, limit: int
) -> None:
    assert limit_of(descriptors) == limit
