"""Shoppers who hold and pay without a pause, repeat each unknown answer, and keep all of them."""

import random
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec

from tests.support.sandbox import RunningSandbox
from tests.support.service import Served

__all__ = ["Held", "Shopping", "shopping"]

#: Pause between two calls of one shopper: a test needs moderate load.
PAUSE_SECONDS = 0.05
#: The share of holds that are paid at once.
PAYING = 0.3
#: A buyer loads the success URL for so long; the settler ends a payment whose process lost its
#: master.
PAY_SECONDS = 3.0
#: A hold is repeated for so long after the end of the shopping.
REPEAT_SECONDS_MAX = 60.0
#: Refusals after which the same call is sent again.
AGAIN = {"unavailable", "outcome_unknown", "sale_recovering", "rate_limited"}


class Held(msgspec.Struct):
    """A hold that was answered with 201."""

    order: dict[str, Any]
    sale_id: str
    buyer: dict[str, str]
    at: float
    payment_key: str = ""
    #: The last status and body of its success URL.
    paid: tuple[int, dict[str, Any]] | None = None

    @property
    def order_id(self) -> str:
        """The order's id."""
        return self.order["orderId"]

    @property
    def is_confirmed(self) -> bool:
        """Whether the buyer was answered that the order is paid."""
        return self.paid is not None and self.paid[1].get("status") == "CONFIRMED"


class Shopping:
    """The answers to all shoppers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.held: dict[str, Held] = {}
        #: Status and code -> count, of prepares and of success URLs.
        self.prepared: Counter[tuple[int, str]] = Counter()
        self.returned: Counter[tuple[int, str]] = Counter()
        #: The rows that refusals named.
        self.rows: Counter[str] = Counter()
        #: The longest series of `outcome_unknown` that one shopper got.
        self.longest_unknown = 0
        self.without_retry_after = 0

    def note(self, answer: httpx.Response, counts: Counter[tuple[int, str]]) -> str:
        """Count an answer; its code."""
        body = answer.json()
        code = body.get("code", "") if answer.status_code >= 400 else body.get("status", "")
        with self._lock:
            counts[answer.status_code, code] += 1
            self.rows.update(row.partition("@")[0] for row in body.get("missing", ()))
            if answer.status_code == 503 and "retry-after" not in answer.headers:
                self.without_retry_after += 1
        return code

    def note_held(self, held: Held) -> None:
        """Keep a hold; a second answer for one key has the same order."""
        with self._lock:
            assert held.order_id not in self.held
            self.held[held.order_id] = held

    def note_unknown(self, series: int) -> None:
        """Note the length of a series of unknown outcomes."""
        with self._lock:
            self.longest_unknown = max(self.longest_unknown, series)

    def of_sale(self, sale_id: str) -> list[Held]:
        """The holds of a sale so far."""
        with self._lock:
            return [held for held in self.held.values() if held.sale_id == sale_id]

    def first_since(self, sale_id: str, since: float) -> float | None:
        """The moment of the first hold after this one; None without any."""
        return min((held.at for held in self.of_sale(sale_id) if held.at > since), default=None)


class _Shopper(threading.Thread):
    def __init__(
        self,
        served: Served,
        sandbox: RunningSandbox,
        sale_ids: Sequence[str],
        found: Shopping,
        stopped: threading.Event,
    ) -> None:
        super().__init__(daemon=True)
        self._served, self._sandbox = served, sandbox
        self._sale_ids, self._found, self._stopped = sale_ids, found, stopped
        self._draw = random.Random(secrets.randbits(64))
        self._give_up_at = float("inf")
        self._unknown = 0
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            while not self._stopped.is_set():
                held = self._hold(self._draw.choice(self._sale_ids))
                if held is not None and self._draw.random() < PAYING:
                    self._pay(held)
                self._stopped.wait(PAUSE_SECONDS)
        except (httpx.HTTPError, ValueError, LookupError, AssertionError) as error:
            self.failure = error

    def _hold(self, sale_id: str) -> Held | None:
        """Hold one unit; repeat until the answer is certain."""
        buyer, key = self._served.buyer(), secrets.token_hex(8)
        code = ""
        while True:
            answer = self._served.prepare(sale_id, buyer, key=key)
            code = self._found.note(answer, self._found.prepared)
            self._unknown = self._unknown + 1 if code == "outcome_unknown" else 0
            self._found.note_unknown(self._unknown)
            if answer.status_code == 201:
                held = Held(answer.json(), sale_id, buyer, time.monotonic())
                self._found.note_held(held)
                return held
            if code == "sold_out":
                return None
            assert code in AGAIN, answer.text
            self._wait()

    def _pay(self, held: Held) -> None:
        """Pay, and load the success URL until its answer is final, or the buyer gives up."""
        give_up_at = time.monotonic() + PAY_SECONDS
        held.payment_key = self._sandbox.put_payment(held.order_id, held.order["amount"])
        while True:
            answer = self._served.open_success_url(held.order, held.payment_key)
            code = self._found.note(answer, self._found.returned)
            held.paid = (answer.status_code, answer.json())
            if self._stopped.is_set() or time.monotonic() > give_up_at:
                return
            if answer.status_code != 202 and code not in AGAIN:
                return
            self._wait()

    def _wait(self) -> None:
        if self._stopped.is_set():
            self._give_up_at = min(self._give_up_at, time.monotonic() + REPEAT_SECONDS_MAX)
            assert time.monotonic() < self._give_up_at, "no certain answer"
        time.sleep(PAUSE_SECONDS)


@contextmanager
def shopping(
    served: Served, sandbox: RunningSandbox, sale_ids: Sequence[str], *, shoppers: int
) -> Iterator[Shopping]:
    """Let this many shoppers hold and pay until the block ends; then each gets its last answer."""
    found, stopped = Shopping(), threading.Event()
    threads = [_Shopper(served, sandbox, sale_ids, found, stopped) for _ in range(shoppers)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        stopped.set()
        for thread in threads:
            thread.join(2 * REPEAT_SECONDS_MAX)
    failures = [thread.failure for thread in threads if thread.failure is not None]
    assert not failures, failures
    assert not any(thread.is_alive() for thread in threads)
