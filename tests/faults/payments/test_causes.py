"""Every cause from its origin through event and SQL to the order that a rebuild restores."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy.exc import OperationalError

from reservation.domain.errors import ReservationError
from reservation.domain.payment import SENTENCES, Cause, Reason
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status
from reservation.sandbox.faults import Fault
from tests.faults.payments.shop import LIMITS, refund_wish, shop, wait_for_status
from tests.support.in_process import Bench
from tests.support.sandbox import RunningSandbox

#: No call is repeated, and the provider's window counts as closed at once.
AT_ONCE = msgspec.structs.replace(
    LIMITS,
    confirm_seconds=10.0,
    look_up_seconds=10.0,
    confirm_again_seconds=0.0,
    window_closed_seconds=0.0,
    missing_apart_seconds=0.0,
)
#: The provider's window of authentication.
WINDOW_SECONDS = 11 * 60


class Scene:
    """A shop with one sale, and the ways in which its orders end."""

    def __init__(
        self, bench: Bench, sandbox: RunningSandbox, patch: pytest.MonkeyPatch, sale_id: str
    ) -> None:
        self.bench, self.sandbox, self.patch, self.sale_id = bench, sandbox, patch, sale_id
        self.service = bench.service

    async def hold(self, buyer: str = "ann") -> Reservation:
        return await self.bench.hold(self.sale_id, buyer)

    async def pay(self, order: Reservation, payment_key: str) -> None:
        """The buyer returns with this payment; a refusal is an end like others."""
        with suppress(ReservationError):
            await self.service.confirmation.confirm(order, payment_key=payment_key, may_claim=True)

    async def paid(self, order: Reservation, **payment: Any) -> str:
        payment_key = self.sandbox.put_payment(order.order_id, order.amount, **payment)
        await self.pay(order, payment_key)
        return payment_key

    async def settle(self, order: Reservation, payment_key: str) -> None:
        """Its process died right after the claim."""
        await self.bench.claim(order, payment_key)
        confirming = self.service.keys.of(self.sale_id).confirming
        await self.service.connections.command("ZADD", confirming, 1, order.order_id)
        await self.service.settlement.settle(order.order_id)

    async def read(self, order: Reservation) -> Reservation:
        found = await self.service.store.read(order.order_id)
        assert found is not None
        return found

    async def fields(self, order: Reservation) -> dict[str, str]:
        """The order's hash, except the id of a call that only Redis has."""
        key = self.service.keys.of(self.sale_id).order(order.order_id)
        flat = await self.service.connections.command("HGETALL", key)
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        fields.pop("claim_id", None)
        return fields


async def buyer(scene: Scene) -> Reservation:
    order = await scene.hold()
    await scene.service.releases.release(order, reason=Reason(Cause.BUYER))
    return order


async def payment_page(scene: Scene) -> Reservation:
    order = await scene.hold()
    reason = Reason(Cause.PAYMENT_PAGE, "PAY_PROCESS_CANCELED")
    await scene.service.releases.if_held(order, reason=reason)
    return order


async def deadline(scene: Scene) -> Reservation:
    order = await scene.hold()
    names = scene.service.keys.of(scene.sale_id)
    key = names.order(order.order_id)
    past = (await scene.read(order)).created_at_ms - 1
    await scene.service.connections.command("HSET", key, "expires_at", past, "hold", 0)
    await scene.service.connections.command("ZADD", names.deadlines, past, order.order_id)
    known = await scene.service.catalog.get(scene.sale_id)
    assert await scene.service.store.expire(scene.sale_id, [order.order_id], epoch=known.epoch)
    return order


async def provider_declined(scene: Scene) -> Reservation:
    order = await scene.hold()
    await scene.paid(order, decline="REJECT_CARD_COMPANY")
    return order


async def payment_aborted(scene: Scene) -> Reservation:
    order = await scene.hold()
    payment_key = scene.sandbox.put_payment(
        order.order_id, order.amount, decline="REJECT_CARD_COMPANY"
    )
    scene.sandbox.confirm(payment_key, order.order_id, order.amount)
    await scene.settle(order, payment_key)
    return order


async def payment_expired(scene: Scene) -> Reservation:
    order = await scene.hold()
    payment_key = scene.sandbox.put_payment(order.order_id, order.amount)
    scene.sandbox.turn_clock(WINDOW_SECONDS)
    await scene.settle(order, payment_key)
    return order


async def session_expired(scene: Scene) -> Reservation:
    order = await scene.hold()
    payment_key = scene.sandbox.put_payment(order.order_id, order.amount)
    scene.sandbox.turn_clock(WINDOW_SECONDS)
    await scene.pay(order, payment_key)
    return order


async def awaiting(scene: Scene) -> tuple[Reservation, str]:
    order = await scene.hold()
    payment_key = await scene.paid(order, method="virtual_account")
    await wait_for_status(scene.service, order, Status.AWAITING_DEPOSIT)
    return order, payment_key


async def payment_cancelled(scene: Scene) -> Reservation:
    order, payment_key = await awaiting(scene)
    assert scene.sandbox.cancel(payment_key).status_code == 200
    await scene.service.notifications.receive(order.order_id, payment_key)
    return order


async def account_not_accepted(scene: Scene) -> Reservation:
    scene.sale_id = await scene.bench.sale(virtual_accounts=False)
    order = await scene.hold()
    await scene.paid(order, method="virtual_account")
    return order


async def no_deposit(scene: Scene) -> Reservation:
    order, _ = await awaiting(scene)
    await scene.service.settlement.deposit(order.order_id)
    return order


async def never_approved(scene: Scene) -> Reservation:
    order = await scene.hold()
    await scene.settle(order, "tviva-made-up-0123456789")
    return order


async def payment_not_found(scene: Scene) -> Reservation:
    order = await scene.hold()
    await scene.pay(order, "tviva-made-up-0123456789")
    return order


async def key_of_another_order(scene: Scene) -> Reservation:
    payment_key = await scene.paid(await scene.hold("ben"))
    order = await scene.hold()
    await scene.pay(order, payment_key)
    return order


async def intent_not_written(scene: Scene) -> Reservation:
    async def away(_: Any) -> None:
        raise OperationalError("INSERT", {}, OSError("SQL is away"))

    order = await scene.hold()
    with scene.patch.context() as patch:
        patch.setattr(scene.service.sql.intents, "add", away)
        await scene.paid(order)
    return order


async def amount_mismatch(scene: Scene) -> Reservation:
    order = await scene.hold()
    wrong_answers = {"orderId": order.order_id, "operations": ["confirm", "look_up"]}
    scene.sandbox.order_fault(Fault.OTHER_AMOUNT, **wrong_answers)
    await scene.paid(order)
    return order


async def cancelled_at_provider(scene: Scene) -> Reservation:
    order = await scene.hold()
    payment_key = scene.sandbox.put_payment(order.order_id, order.amount)
    scene.sandbox.confirm(payment_key, order.order_id, order.amount)
    assert scene.sandbox.cancel(payment_key).status_code == 200
    await scene.settle(order, payment_key)
    return order


async def paid_after_end(scene: Scene) -> Reservation:
    order = await buyer(scene)
    payment_key = scene.sandbox.put_payment(order.order_id, order.amount)
    scene.sandbox.confirm(payment_key, order.order_id, order.amount)
    await scene.service.notifications.receive(order.order_id, payment_key)
    return order


async def payment_of_another_order(scene: Scene) -> Reservation:
    other = await scene.hold("ben")
    payment_key = scene.sandbox.put_payment(other.order_id, other.amount)
    order = await scene.hold()
    await scene.pay(order, payment_key)
    return order


async def order_id_used(scene: Scene) -> Reservation:
    order = await account_not_accepted(scene)
    await wait_for_status(scene.service, order, Status.RELEASED)
    await scene.paid(order)
    return order


async def operator(scene: Scene) -> Reservation:
    order = await scene.hold()
    await scene.paid(order)
    await wait_for_status(scene.service, order, Status.CONFIRMED)
    assert await scene.service.refunds.refund(refund_wish(order))
    return order


#: The origin of each cause, and its final status.
ORIGINS: dict[Cause, tuple[Callable[[Scene], Awaitable[Reservation]], Status]] = {
    Cause.BUYER: (buyer, Status.RELEASED),
    Cause.PAYMENT_PAGE: (payment_page, Status.RELEASED),
    Cause.DEADLINE: (deadline, Status.EXPIRED),
    Cause.PROVIDER_DECLINED: (provider_declined, Status.RELEASED),
    Cause.PAYMENT_ABORTED: (payment_aborted, Status.RELEASED),
    Cause.PAYMENT_EXPIRED: (payment_expired, Status.EXPIRED),
    Cause.SESSION_EXPIRED: (session_expired, Status.EXPIRED),
    Cause.PAYMENT_CANCELLED: (payment_cancelled, Status.RELEASED),
    Cause.ACCOUNT_NOT_ACCEPTED: (account_not_accepted, Status.RELEASED),
    Cause.NO_DEPOSIT: (no_deposit, Status.EXPIRED),
    Cause.NEVER_APPROVED: (never_approved, Status.EXPIRED),
    Cause.PAYMENT_NOT_FOUND: (payment_not_found, Status.HELD),
    Cause.KEY_OF_ANOTHER_ORDER: (key_of_another_order, Status.HELD),
    Cause.INTENT_NOT_WRITTEN: (intent_not_written, Status.HELD),
    Cause.AMOUNT_MISMATCH: (amount_mismatch, Status.REFUNDED),
    Cause.CANCELLED_AT_PROVIDER: (cancelled_at_provider, Status.REFUNDED),
    Cause.PAID_AFTER_END: (paid_after_end, Status.REFUNDED),
    Cause.PAYMENT_OF_ANOTHER_ORDER: (payment_of_another_order, Status.HELD),
    Cause.ORDER_ID_USED: (order_id_used, Status.RELEASED),
    Cause.OPERATOR: (operator, Status.REFUNDED),
}


@pytest.mark.parametrize("cause", Cause)
async def test_each_cause_keeps_its_code_up_to_the_rebuilt_order(
    tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch, cause: Cause
) -> None:
    origin, status = ORIGINS[cause]
    async with shop(tmp_path, valkey_url, limits=AT_ONCE) as (bench, sandbox):
        scene = Scene(bench, sandbox, monkeypatch, await bench.sale(virtual_accounts=True))
        order = await origin(scene)
        await wait_for_status(scene.service, order, status)
        await bench.flush(scene.sale_id)

        history = await scene.service.sql.orders.history(order.order_id)
        event = [row for row in history if row.kind == "event" and '"cause"' in row.facts][-1]
        data = msgspec.json.decode(event.facts)
        reason = Reason.read(event.what, data)
        assert reason is not None
        assert (data["cause"], reason.cause) == (cause.value, cause)
        assert not any(sentence in event.facts for sentence in SENTENCES.values())

        # `deadline` moved the order's own clock by hand, and the audit would report it.
        if cause is not Cause.DEADLINE:
            assert await bench.audited(scene.sale_id) == ()
        before = await scene.fields(order)
        await bench.lose(scene.sale_id)
        await scene.service.rebuild.run(scene.sale_id, operator="op")
        after = await scene.fields(order)
        moved = {"expires_at", "hold"} if cause is Cause.DEADLINE else set[str]()
        assert {name: after.get(name) for name in before.keys() - moved} == {
            name: before[name] for name in before.keys() - moved
        }
        assert after.keys() == before.keys()
