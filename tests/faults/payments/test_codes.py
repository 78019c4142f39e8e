"""Error codes of the PG: one that its pages do not list never gives stock back."""

import asyncio
import string
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from reservation.adapters.toss.error_codes import TABLES, Operation
from reservation.bootstrap import Service, opened
from reservation.config.settings import Settings
from reservation.domain.errors import PaymentDeclined
from reservation.domain.payment_timeouts import DEFAULT_LIMITS
from reservation.domain.sale import Item
from reservation.domain.states import Status
from tests.support.in_process import Bench
from tests.support.sandbox import RunningSandbox, running_sandbox

EXAMPLES = 50
LISTED = sorted(TABLES[Operation.CONFIRM])
LIMITS = msgspec.structs.replace(DEFAULT_LIMITS, answer_seconds=0.01, pause_most_seconds=0.01)


def near(code: str, place: int, letter: str) -> str:
    """A listed word with another letter: like a typing error, or next year's page."""
    place %= len(code)
    return code[:place] + letter + code[place + 1 :]


letters = st.sampled_from(string.ascii_uppercase + "_" + string.digits)
unlisted = (
    st.text(letters, min_size=1, max_size=60)
    | st.builds(near, st.sampled_from(LISTED), st.integers(1, 99), letters)
    | st.builds(lambda code, more: f"{code}_{more}", st.sampled_from(LISTED), letters)
).filter(lambda code: code[0] in string.ascii_uppercase and code not in LISTED)


class Counter:
    """A shop that takes one card after the other, with access to the payments of its PG."""

    def __init__(
        self, runner: asyncio.Runner, service: Service, sandbox: RunningSandbox, sale_id: str
    ) -> None:
        self.runner, self.service, self.sandbox = runner, service, sandbox
        self.bench, self.sale_id = Bench(service), sale_id
        self.orders: list[str] = []

    def stock(self) -> tuple[int, int, int]:
        counters = self.runner.run(self.service.sale_store.counters(self.sale_id))
        assert counters is not None
        _, *shares = counters.stocks["a"]
        available, held, sold = shares
        return available, held, sold

    async def tried(self, code: str) -> Status:
        """The status of an order whose card got this answer, while the PG is unreachable."""
        order = await self.bench.hold(self.sale_id, buyer=f"buyer-{len(self.orders)}")
        self.orders.append(order.order_id)
        key = self.sandbox.put_payment(order.order_id, order.amount, decline=code)
        self.sandbox.order_fault(
            "error_before_commit", orderId=order.order_id, operations=["look_up"]
        )
        # Whether the answer comes within the wait for it or not.
        with suppress(PaymentDeclined):
            await self.service.confirmation.confirm(order, payment_key=key, may_claim=True)
        while self.service.confirmation._under_way:  # noqa: ASYNC110 - the condition has no event
            await asyncio.sleep(0.001)
        found = await self.service.store.read(order.order_id)
        assert found is not None
        return found.status


@pytest.fixture(scope="module")
def counter(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Iterator[Counter]:
    folder = tmp_path_factory.mktemp("codes")
    with running_sandbox(folder) as sandbox, asyncio.Runner() as runner:
        given = Settings.load(
            {
                "RESERVATION_DATA_DIR": str(folder),
                "RESERVATION_REDIS_URL": valkey_url,
                "RESERVATION_TOSS_API_URL": sandbox.url,
            },
            None,
        )
        stack = AsyncExitStack()
        service = runner.run(stack.enter_async_context(opened(given, limits=LIMITS)))
        item = Item(sku="a", name="A", price=1000, total=10_000, limit_per_buyer=1)
        sale_id = runner.run(Bench(service).sale(items=(item,)))
        yield Counter(runner, service, sandbox, sale_id)
        runner.run(stack.aclose())


@pytest.mark.slow
@given(code=unlisted)
@example(code="REJECT_CARD_COMPANY_V2")
@example(code="NOT_FOUND_PAYMENT_SESSIONS")
@settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_an_unlisted_code_keeps_the_hold_until_a_look_up(counter: Counter, code: str) -> None:
    available, held, sold = counter.stock()
    assert counter.runner.run(counter.tried(code)) is Status.CONFIRMING
    assert counter.stock() == (available - 1, held + 1, sold)


def test_a_listed_decline_releases_the_hold_at_once(counter: Counter) -> None:
    """Control: the same steps with a word that is on the list."""
    before = counter.stock()
    assert counter.runner.run(counter.tried("REJECT_CARD_COMPANY")) is Status.RELEASED
    assert counter.stock() == before
