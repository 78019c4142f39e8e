"""Frozen processes: one that wakes up after its payment has ended changes nothing.

Its lease ends while it is frozen, the settler takes the payment to its end, and then it continues
from the very instruction where it stopped: with an old fence, and perhaps with the PG's answer.
"""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from reservation.bootstrap import Service, opened
from reservation.config.settings import Settings
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.failpoints import POINTS
from tests.faults.payments.freezing_process import LIMITS
from tests.support.in_process import Bench
from tests.support.sandbox import running_sandbox

#: A start takes a second, a lease three; the rest is for a busy machine.
PATIENCE_SECONDS = 40.0
#: The fail points at which the buyer's own process can freeze.
OWN_POINTS = [point for point in POINTS if point.startswith(("confirm:", "conclude:"))]


@contextmanager
def returning(
    environ: dict[str, str], order: Reservation, payment_key: str, point: str
) -> Iterator["subprocess.Popen[str]"]:
    """The buyer's return in its own process, ended with the block."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.faults.payments.freezing_process",
            order.order_id,
            payment_key,
            point,
        ],
        cwd=Path(__file__).parents[3],
        env={"PATH": os.environ["PATH"], **environ},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


async def until_frozen(process: "subprocess.Popen[str]") -> None:
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        assert process.poll() is None, "it went past the point"
        assert time.monotonic() < give_up_at
        await asyncio.sleep(0.02)


async def settled(service: Service, order_id: str, payment_key: str) -> Reservation:
    """The order once another process has taken its payment as far as it goes now."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while True:
        order = await service.store.read(order_id)
        assert order is not None
        if order.status is Status.HELD and not order.payment_key:
            # Frozen before its claim: the buyer loads the page again, elsewhere.
            order = await service.confirmation.confirm(
                order, payment_key=payment_key, may_claim=True
            )
        if order.status is not Status.CONFIRMING:
            return order
        assert time.monotonic() < give_up_at, order
        if order_id in await service.store.leases_over(order.sale_id, 10):
            await service.settlement.settle(order_id)
        await asyncio.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("point", OWN_POINTS)
async def test_a_process_resumed_after_the_end_neither_charges_nor_sells(
    tmp_path: Path, valkey_url: str, point: str
) -> None:
    with running_sandbox(tmp_path) as sandbox:
        environ = {
            "RESERVATION_DATA_DIR": str(tmp_path),
            "RESERVATION_REDIS_URL": valkey_url,
            "RESERVATION_TOSS_API_URL": sandbox.url,
        }
        async with opened(Settings.load(environ, None), limits=LIMITS) as service:
            bench = Bench(service)
            sale_id = await bench.sale()
            order = await bench.hold(sale_id)
            payment_key = sandbox.put_payment(order.order_id, order.amount)
            with returning(environ, order, payment_key, point) as process:
                await until_frozen(process)
                ended = await settled(service, order.order_id, payment_key)
                assert ended.status is Status.CONFIRMED
                await bench.flush(sale_id)
                before = await bench.remembered(sale_id)
                process.send_signal(signal.SIGCONT)
                output, _ = await asyncio.to_thread(process.communicate, None, PATIENCE_SECONDS)
            assert process.returncode == 0
            # Its buyer still gets the true outcome.
            assert output.splitlines()[-1] == Status.CONFIRMED
            assert await bench.remembered(sale_id) == before
            assert await bench.audited(sale_id) == ()
            ledger = sandbox.ledger(order.order_id)
            assert [entry["amount"] for entry in ledger["entries"]] == [order.amount]
