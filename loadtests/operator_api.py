"""Operator's desk of a load test: the sale, its counters, its books."""

import secrets
import time
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from urllib.parse import urlsplit

import httpx

from loadtests.buyer_outcomes import Answers
from reservation.verification.balance_check import BalanceCheck, books_of

__all__ = ["CannotBegin", "OperatorApi", "address_of"]

HTTP_SECONDS: Final = 30.0
#: Tries of a request while an overloaded service does not answer, and the pause between them.
TRIES_MAX: Final = 20
TRY_SECONDS: Final = 0.5
#: Time from the last hold's end until everything is settled and in SQL: the lease of a confirm that
#: was cut off, and a few polls of the PG.
SETTLE_SECONDS: Final = 120.0
POLL_SECONDS: Final = 0.5
#: Orders in one page, and the most pages that are read.
PAGE: Final = 100
PAGES_MAX: Final = 100_000
PRICE: Final = 19_000
#: The id of no sale: a request for it checks the credentials only.
NO_SALE: Final = "load-nobody"


class CannotBegin(Exception):
    """No run is possible against this service, with the reason in one sentence."""


def address_of(url: str) -> str:
    """The service's address without a slash at its end.

    Raises:
        CannotBegin: it is none.
    """
    try:
        parts = urlsplit(url)
        named = parts.scheme in {"http", "https"} and bool(parts.hostname)
        if named and not (parts.path.strip("/") or parts.query or parts.fragment):
            # Reading the port checks it.
            _ = parts.port
            return f"{parts.scheme}://{parts.netloc}"
    except ValueError:
        pass
    raise CannotBegin(f"{url!r} is not an address of a service: http://HOST:PORT is one")


class OperatorApi:
    """Client of one service and its sandbox."""

    def __init__(self, service_url: str, admin_key: str) -> None:
        self._url = address_of(service_url)
        self._http = httpx.Client(
            base_url=self._url,
            timeout=HTTP_SECONDS,
            headers={"Authorization": f"Bearer {admin_key}", "X-Operator": "loadtest"},
            trust_env=False,
        )
        # Another client: the operator's key must not go to the PG.
        self._pg = httpx.Client(timeout=HTTP_SECONDS, trust_env=False)

    def check(self, buyer_token: str) -> None:
        """Check that the service accepts our operator's key and our buyers' tokens.

        Raises:
            CannotBegin: it does not; without buyers and books a run proves nothing.
        """
        buyer = {"Authorization": f"Bearer {buyer_token}"}
        for path, headers, setting in (
            ("/v1/admin/orders?limit=1", {}, "RESERVATION_ADMIN_API_KEY"),
            (
                f"/v1/sales/{NO_SALE}/reservations",
                buyer,
                "RESERVATION_AUTH=guest and RESERVATION_JWT_SECRET",
            ),
        ):
            try:
                status = self._http.get(path, headers=headers).status_code
            except httpx.HTTPError as error:
                raise CannotBegin(
                    f"no service is reachable at {self._url}: {type(error).__name__}"
                ) from error
            if status in {401, 403}:
                raise CannotBegin(
                    f"{self._url} answers {status} to GET {path}: the load test needs the"
                    f" service's own {setting} in its environment"
                )

    def open_sale(self, *, items: int, stock: int, hold_seconds: int) -> str:
        """A sale for this run alone; its id."""
        sale_id = f"load-{secrets.token_hex(4)}"
        now = datetime.now(UTC)
        document = {
            "name": "Load test",
            "currency": "KRW",
            "opensAt": (now - timedelta(minutes=1)).isoformat(),
            "closesAt": (now + timedelta(days=1)).isoformat(),
            "holdSeconds": hold_seconds,
            "holdPolicy": "prepare",
            "items": [
                {
                    "sku": f"piece-{number}",
                    "name": f"Piece {number}",
                    "price": PRICE,
                    "total": stock,
                    "limitPerBuyer": 1,
                }
                for number in range(1, items + 1)
            ],
        }
        self._send(self._http, "PUT", f"/v1/admin/sales/{sale_id}", document)
        return sale_id

    def sale(self, sale_id: str) -> dict[str, Any]:
        """The sale with its counters."""
        return self._send(self._http, "GET", f"/v1/admin/sales/{sale_id}")

    def settled(self, sale_id: str) -> dict[str, Any]:
        """The audit once nothing is held and SQL has it all, or the last one before the limit."""
        sale = self.sale(sale_id)
        give_up_at = time.monotonic() + sale["holdSeconds"] + SETTLE_SECONDS
        while True:
            audit = self._send(self._http, "GET", f"/v1/admin/sales/{sale_id}/audit")
            held = sum(row["held"] for row in audit["skus"])
            if (not held and not audit["lag"]) or time.monotonic() > give_up_at:
                return audit
            time.sleep(POLL_SECONDS)

    def books(self, sale_id: str, audit: dict[str, Any], answers: Answers) -> BalanceCheck:
        """Audit, orders and the PG's ledger, side by side."""
        entries: list[dict[str, Any]] = []
        if answers.sandbox_url:
            entries = self._send(self._pg, "GET", f"{answers.sandbox_url}/_ledger")["entries"]
        return books_of(sale_id, audit=audit, orders=self._orders(sale_id), entries=entries)

    def _orders(self, sale_id: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        query = {"saleId": sale_id, "limit": str(PAGE)}
        for _ in range(PAGES_MAX):
            page = self._send(self._http, "GET", f"/v1/admin/orders?{httpx.QueryParams(query)}")
            found += page["orders"]
            if page["nextCursor"] is None:
                return found
            query["cursor"] = page["nextCursor"]
        raise RuntimeError(f"{sale_id} has more than {PAGE * PAGES_MAX} orders")

    @staticmethod
    def _send(
        client: httpx.Client, method: str, url: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One request, retried under overload; every call here is idempotent."""
        for attempt in range(1, TRIES_MAX + 1):
            try:
                answer = client.request(method, url, json=body)
            except httpx.TransportError:
                if attempt == TRIES_MAX:
                    raise
            else:
                if answer.status_code not in {429, 503} or attempt == TRIES_MAX:
                    return answer.raise_for_status().json()
            time.sleep(TRY_SECONDS)
        raise AssertionError("unreachable")
