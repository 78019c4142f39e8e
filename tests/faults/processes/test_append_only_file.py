"""Append-only file after damage: consistent, complete up to the last answer, or refused by name.

cut        at any byte, as a crash of the machine may leave it
power cut  back to the bytes that the last sync had made durable: no answered event is lost
flip       one bit, as a disk may: refused by the server, or reported by the audit
"""

import contextlib
import random
import secrets
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from reservation.adapters.redis.embedded.server import EmbeddedServer, EmbeddedServerError
from reservation.domain.errors import BrokenInvariant, SaleRecovering
from tests.faults.processes.bad_machine import Machine, build, last_sync
from tests.faults.processes.recorded_sale import RecordedSale, contents, record, started, whole
from tests.support.in_process import Bench

#: Of the cuts that put Redis behind SQL, one in this many is rebuilt: it takes a second.
REBUILT_OF = 8

push = pytest.mark.slow
full = pytest.mark.soak


@pytest.fixture
def draw() -> random.Random:
    """Part of each failure's message, so that the same bytes can be hit again."""
    seed = secrets.randbelow(1 << 31)
    sys.stdout.write(f"seed {seed}\n")
    return random.Random(seed)


@pytest.fixture
async def recorded(tmp_path: Path, draw: random.Random) -> RecordedSale:
    return await record(tmp_path / "recorded", draw)


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    return build(tmp_path)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("cuts", [pytest.param(40, marks=push), pytest.param(400, marks=full)])
async def test_a_truncated_file_keeps_its_prefix_and_sells_nothing_behind_sql(
    recorded: RecordedSale, tmp_path: Path, draw: random.Random, cuts: int
) -> None:
    size = recorded.file.stat().st_size
    ends = Counter[str]()
    for number in range(cuts):
        length = draw.randrange(size)
        copy = recorded.copy(tmp_path / f"cut-{number}")
        with copy.file.open("r+b") as file:
            file.truncate(length)
        behind_sql = ends["closed"] + ends["rebuilt"]
        ends[await end_of(copy, length, rebuild=behind_sql % REBUILT_OF == 0)] += 1
        shutil.rmtree(copy.folder)
    sys.stdout.write(f"{cuts} cuts: {dict(ends)}\n")
    # Cuts on both sides of SQL's position were made, or the test proves nothing.
    assert ends["goes on"]
    assert ends["closed"]
    assert ends["rebuilt"]


async def end_of(copy: RecordedSale, length: int, *, rebuild: bool) -> str:
    """The outcome for a server on this file, and a service on it."""
    async with started(copy.folder) as bench:
        seq = await whole(bench, copy.sale_id)
        assert seq >= copy.last_answer(length)
        service = bench.service
        await service.redis_monitor.check_redis()
        if seq >= copy.flushed_seq:
            assert copy.sale_id not in service.redis_monitor.gaps
            # A flusher recreates its group where that was cut off.
            await bench.flush(copy.sale_id)
            await service.redis_monitor.check_redis()
            assert await bench.audited(copy.sale_id) == ()
            await bench.hold(copy.sale_id, buyer="after")
            return "goes on"
        assert copy.sale_id in service.redis_monitor.gaps
        with pytest.raises(SaleRecovering):
            await bench.hold(copy.sale_id, buyer="after")
        assert await whole(bench, copy.sale_id) == seq
        if not rebuild:
            return "closed"
        await service.rebuild.run(copy.sale_id, operator="op")
        await service.redis_monitor.check_redis()
        await bench.flush(copy.sale_id)
        assert await bench.audited(copy.sale_id) == ()
        await bench.hold(copy.sale_id, buyer="after")
        return "rebuilt"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("cuts", [pytest.param(4, marks=push), pytest.param(20, marks=full)])
async def test_a_power_cut_loses_no_acknowledged_write(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    draw: random.Random,
    recorder: Path,
    cuts: int,
) -> None:
    for number in range(cuts):
        log = tmp_path / f"syncs-{number}"
        with monkeypatch.context() as patch:
            for name, value in Machine(recorder, log).environ.items():
                patch.setenv(name, value)
            made = await record(tmp_path / f"power-{number}", draw)
        synced = last_sync(log, made.file)
        assert synced >= made.answers[-1].file_bytes, "an answer left before its sync"
        with made.file.open("r+b") as file:
            file.truncate(synced)
        async with started(made.folder) as bench:
            assert await whole(bench, made.sale_id) == made.answers[-1].seq
            await bench.flush(made.sale_id)
            assert await bench.audited(made.sale_id) == ()
        shutil.rmtree(made.folder)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("flips", [pytest.param(15, marks=push), pytest.param(50, marks=full)])
async def test_a_flipped_bit_is_detected_by_the_server_or_the_audit(
    recorded: RecordedSale, tmp_path: Path, draw: random.Random, flips: int
) -> None:
    expected = await undamaged(recorded, tmp_path / "whole")
    ends = Counter[str]()
    unseen: list[str] = []
    data = recorded.file.read_bytes()
    for number in range(flips):
        copy = recorded.copy(tmp_path / f"flip-{number}")
        place, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        copy.file.write_bytes(flipped(data, place, bit))
        around = data[max(0, place - 60) : place + 20]
        end = await found_by(copy, expected)
        ends[end] += 1
        if end == "unseen":
            unseen.append(f"bit {bit} of byte {place}: {around!r}")
        shutil.rmtree(copy.folder)
    sys.stdout.write(f"{flips} flips: {dict(ends)}\n")
    assert not unseen, "\n".join(unseen)
    assert ends["found by the audit"] or ends["closed"], "only what the server refuses was hit"


@pytest.mark.parametrize(
    ("behind_flushed", "end"), [(0, "nothing changed"), (1, "found by the audit")]
)
async def test_an_event_dropped_by_the_server_matters_only_without_sql(
    recorded: RecordedSale, tmp_path: Path, behind_flushed: int, end: str
) -> None:
    expected = await undamaged(recorded, tmp_path / "whole")
    copy = recorded.copy(tmp_path / "flip")
    data, number = recorded.file.read_bytes(), str(recorded.flushed_seq + behind_flushed)
    added = f"{recorded.sale_id}}}:outbox\r\n${len(number) + 2}\r\n{number}-0\r\n".encode()
    # Its first digit loses a bit: by that number it comes before others, and is refused.
    place = data.index(added) + added.rindex(f"{number}-0".encode())
    digit = int(number[0])
    copy.file.write_bytes(flipped(data, place, digit & -digit))
    assert await found_by(copy, expected) == end


async def undamaged(recorded: RecordedSale, to: Path) -> dict[Any, Any]:
    """The state of a server on these files."""
    copy = recorded.copy(to)
    async with started(copy.folder) as bench:
        return await contents(bench.service.settings.redis_url, flushed_seq=copy.flushed_seq)


def flipped(data: bytes, place: int, bit: int) -> bytes:
    """A copy with one bit changed."""
    return data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]


async def found_by(copy: RecordedSale, expected: dict[Any, Any]) -> str:
    """The check that notices the damage, if there is any."""
    server = EmbeddedServer(copy.folder)
    with contextlib.suppress(EmbeddedServerError):
        await server.start()
        await server.stop()
        async with started(copy.folder) as bench:
            return await audited(copy, bench, expected)
    return "refused"


async def audited(copy: RecordedSale, bench: Bench, expected: dict[Any, Any]) -> str:
    service = bench.service
    there = await contents(service.settings.redis_url, flushed_seq=copy.flushed_seq)
    # A key under an unused name is harmless; its absence elsewhere may be damage.
    if {key: there.get(key) for key in expected} == expected:
        return "nothing changed"
    try:
        await service.redis_monitor.check_redis()
    except (BrokenInvariant, ValueError, KeyError):
        # In the service an alarm, and no check that admits a buyer.
        return "closed"
    if copy.sale_id in service.redis_monitor.gaps or service.redis_monitor.missing_of:
        return "closed"
    if await bench.audited(copy.sale_id):
        return "found by the audit"
    await bench.flush(copy.sale_id)
    if bench.alarms or await bench.audited(copy.sale_id):
        return "found by the audit"
    return "unseen"
