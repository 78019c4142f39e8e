"""Freezing process: one buyer's return, in a process that stops itself at a fail point.

    python -m tests.faults.payments.freezing_process ORDER PAYMENT_KEY POINT

Settings come from the environment. It continues at SIGCONT, and writes the response to the attempt.
"""

import asyncio
import os
import signal
import sys
from typing import Final

from reservation import failpoints
from reservation.bootstrap import opened
from reservation.config.settings import Settings
from reservation.domain.errors import ReservationError
from reservation.domain.payment_timeouts import PaymentTimeouts

#: As in production, but for a lease that a test can wait out.
LIMITS: Final = PaymentTimeouts(
    confirm_seconds=2.0,
    look_up_seconds=2.0,
    lease_margin_seconds=1.0,
    lease_left_seconds=0.2,
    answer_seconds=5.0,
    pause_most_seconds=1.0,
)


def freeze(_: str) -> None:
    """Stop this process between two of its instructions, as a hypervisor may."""
    failpoints.disarm()
    os.kill(os.getpid(), signal.SIGSTOP)


async def main(order_id: str, payment_key: str, point: str) -> None:
    failpoints.arm(point, freeze)
    async with opened(Settings.load(os.environ, None), limits=LIMITS) as service:
        order = await service.queries.find(order_id)
        assert order is not None
        try:
            outcome = (
                await service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)
            ).status
        except ReservationError as error:
            outcome = type(error).__name__
    sys.stdout.write(f"{outcome}\n")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
