"""The client for asyncio."""

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Final, Self

import httpx

from reservation.client import calls
from reservation.client.calls import A, Call
from reservation.client.errors import ClientError, NoAnswer
from reservation.client.models import Guest, Reservation, Sale
from reservation.client.proxies import uses_proxies
from reservation.client.retries import Attempts, Retries

__all__ = ["AsyncClient"]

#: Time-out of one request before a retry; prepare itself answers within a few seconds.
SECONDS_MAX: Final = 10.0


class AsyncClient:
    """One buyer's calls, over one connection pool.

    Args:
        url: the service's address.
        token: the buyer's bearer token: the shop's own JWT, or a guest's.
        retries: when and how often a call is repeated.
        transport: sends the requests; httpx's own by default.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        retries: Retries | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._token = token
        self._retries = retries or Retries()
        self._http = httpx.AsyncClient(
            base_url=url,
            transport=transport,
            headers={"Accept": "application/json"},
            timeout=SECONDS_MAX,
            trust_env=uses_proxies(url),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def become_guest(self) -> Guest:
        """Become a new guest, if the service takes guests; later calls are this buyer's."""
        guest = await self._answer(calls.guest())
        self._token = guest.token
        return guest

    async def sales(self) -> tuple[Sale, ...]:
        """Every sale: live ones first, then upcoming, then past."""
        page = await self._answer(calls.sales(None))
        found = page.sales
        while page.next_cursor is not None and page.sales:
            page = await self._answer(calls.sales(page.next_cursor))
            found += page.sales
        return found

    async def sale(self, sale_id: str) -> Sale:
        """One sale with its stock."""
        return await self._answer(calls.sale(sale_id))

    async def prepare(
        self,
        sale_id: str,
        basket: Mapping[str, int],
        *,
        amount: int,
        order_name: str | None = None,
        key: str | None = None,
        admission: str | None = None,
    ) -> Reservation:
        """Hold a basket until its deadline.

        Args:
            sale_id: the sale.
            basket: sku -> quantity, at most 20 of them.
            amount: the total that the buyer was shown, in minor units.
            order_name: its name on the payment page, at most 100 characters.
            key: the idempotency key of this basket. Store and pass your own if the request must
                survive this process; by default a random one is used.
            admission: of `Sale.admission`, if the sale requires one.

        Raises:
            Refused: and nothing is held, unless `code` is `outcome_unknown`.
            NoAnswer: the outcome is unknown; a call with the same key returns it.
        """
        return await self._answer(
            calls.prepare(
                sale_id,
                basket,
                amount=amount,
                order_name=order_name,
                key=key,
                admission=admission,
            )
        )

    async def reservations(self, sale_id: str) -> tuple[Reservation, ...]:
        """This buyer's own in one sale, newest first."""
        return (await self._answer(calls.reservations(sale_id))).reservations

    async def reservation(
        self, order_id: str, *, token: str | None = None, wait: int = 0
    ) -> Reservation:
        """One reservation; with `wait`, at its next change or after `wait` seconds (at most 25)."""
        return await self._answer(calls.reservation(order_id, token=token, wait=wait))

    async def release(self, order_id: str, *, token: str | None = None) -> Reservation:
        """Release a hold.

        The account of an order that is AWAITING_DEPOSIT is cancelled: the order stays so until the
        payment provider confirms it, then it is RELEASED, or CONFIRMED if the deposit came first.
        """
        return await self._answer(calls.release(order_id, token=token))

    async def _answer(self, call: Call[A]) -> A:
        attempts = Attempts(self._retries)
        while True:
            try:
                return calls.read(call, await self._send(call))
            except ClientError as error:
                pause = attempts.pause_after(error)
            await asyncio.sleep(pause)

    async def _send(self, call: Call[A]) -> httpx.Response:
        headers = dict(call.headers)
        if call.as_buyer and self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            return await self._http.request(
                call.method,
                call.path,
                headers=headers,
                json=call.body,
                timeout=SECONDS_MAX + call.patience,
            )
        except httpx.TransportError as error:
            raise NoAnswer(f"{call.method} {call.path}: {error!r}") from error
