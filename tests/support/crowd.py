"""Buyers who prepare without a pause, and the answers that they got."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.support.service import Served

__all__ = ["Answers", "buying"]

#: Pause between two prepares of one buyer: a test needs moderate load.
PAUSE_SECONDS = 0.02


class Answers:
    """The answers of all buyers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: (sale, status, code) -> count.
        self.counts: Counter[tuple[str, int, str]] = Counter()
        #: The orders that were answered with 201, by sale, each with the moment of its answer.
        self.held: dict[str, list[tuple[float, str]]] = {}
        #: Refusals with status 503 that had no Retry-After.
        self.without_retry_after = 0

    def add(self, sale_id: str, answer: httpx.Response) -> None:
        body = answer.json()
        with self._lock:
            self.counts[sale_id, answer.status_code, body.get("code", "")] += 1
            if answer.status_code == 201:
                self.held.setdefault(sale_id, []).append((time.monotonic(), body["orderId"]))
            if answer.status_code == 503 and "retry-after" not in answer.headers:
                self.without_retry_after += 1

    def codes(self, sale_id: str = "") -> set[tuple[int, str]]:
        """The statuses and codes so far, of one sale or of all."""
        with self._lock:
            return {(status, code) for (name, status, code) in self.counts if sale_id in ("", name)}

    def held_since(self, sale_id: str, since: float) -> list[str]:
        """The orders that were held after this moment of the monotonic clock."""
        with self._lock:
            return [order for at, order in self.held.get(sale_id, ()) if at > since]

    def first_held_since(self, sale_id: str, since: float) -> float:
        """The time of the first hold after this time; there must be one."""
        with self._lock:
            return min(at for at, _ in self.held[sale_id] if at > since)


@contextmanager
def buying(served: Served, sale_ids: list[str], *, buyers: int) -> Iterator[Answers]:
    """Let this many buyers prepare in all these sales in turn until the block ends."""
    answers, stopped = Answers(), threading.Event()
    failures: list[Exception] = []

    def shop(number: int) -> None:
        step = number
        try:
            while not stopped.is_set():
                sale_id = sale_ids[step % len(sale_ids)]
                step += 1
                answers.add(sale_id, served.prepare(sale_id, served.buyer()))
                stopped.wait(PAUSE_SECONDS)
        except (httpx.HTTPError, ValueError, LookupError) as error:
            failures.append(error)

    threads = [threading.Thread(target=shop, args=(number,)) for number in range(buyers)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stopped.set()
        for thread in threads:
            thread.join()
    assert not failures, failures
