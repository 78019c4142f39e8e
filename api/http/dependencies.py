"""Shared dependencies of the endpoints: the connected service, guards and caller identity."""

import re
from typing import Any, Final

import msgspec
from litestar import Request
from litestar.connection import ASGIConnection
from litestar.datastructures import State
from litestar.handlers.base import BaseRouteHandler

from api.http.auth.bearer import Connection
from api.http.auth.buyers import Buyers
from api.http.auth.client_address import ClientAddressResolver
from api.http.auth.guests import Guests
from api.http.auth.operators import Operators
from api.http.schemas.reservations import PaymentAnswer, ReservationAnswer
from reservation.application.sales.catalog import CachedSale
from reservation.bootstrap import Service
from reservation.domain import ids
from reservation.domain.errors import (
    BrokenInvariant,
    InvalidToken,
    ReservationNotFound,
    SaleNotFound,
    SaleRecovering,
    Unauthenticated,
)
from reservation.domain.operators import Operator, Right
from reservation.domain.rate_limit import Limiter
from reservation.domain.reservation import Reservation
from reservation.domain.states import Status, Visibility
from reservation.domain.tokens import READ_LIFE_MS, TOKEN_LIFE_MS, Claims, Purpose

__all__ = [
    "PRIVATE",
    "RIGHT",
    "SALE_ID",
    "ApiContext",
    "api_of",
    "buyer_of",
    "known_sale",
    "needs",
    "operator_name",
    "operator_of",
    "requires_buyer",
    "requires_operator",
]

#: A buyer's data must stay out of caches, and its URL out of a Referer.
PRIVATE: Final = {"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
SALE_ID: Final = re.compile(ids.SALE_ID)
_BUYER = "buyer_id"
_OPERATOR = "operator"
#: The member of a route handler's `opt` that has the right which it requires.
RIGHT: Final = "right"
#: Before the payment has begun.
_UNPAID = (Status.HELD, Status.PREPARED)


class ApiContext(msgspec.Struct, frozen=True, kw_only=True):
    """One application's context."""

    service: Service
    buyers: Buyers
    guests: Guests
    operators: Operators
    peers: ClientAddressResolver
    #: Checked before the queue; the script counts successful holds.
    prepares: Limiter | None
    #: Budget for calls over that limit that may be replays of a key: the number of lookups.
    replays: Limiter | None

    def token(
        self, order: Reservation, purpose: Purpose, *, epoch: str, customer_key: str = ""
    ) -> str:
        """A token of ours for this reservation; the buyer's customer key where it is known."""
        buyer = customer_key or self.service.order_ids.customer_key(order.buyer_id)
        return self.service.signer.sign(self.claims(order, purpose, epoch=epoch, buyer=buyer))

    def claims(self, order: Reservation, purpose: Purpose, *, epoch: str, buyer: str) -> Claims:
        """The claims of this reservation's token; `buyer` is the customer key."""
        if purpose is Purpose.READ:
            ends_at_ms = self.service.clock.now_ms() + READ_LIFE_MS
        else:
            ends_at_ms = order.expires_at_ms + TOKEN_LIFE_MS
        return Claims(
            purpose=purpose.value,
            sale_id=order.sale_id,
            order_id=order.order_id,
            buyer=buyer,
            amount=order.amount,
            expires_at_ms=ends_at_ms,
            epoch=epoch,
            seq=order.seq,
        )

    def payment(
        self, order: Reservation, *, epoch: str, now_ms: int | None = None
    ) -> PaymentAnswer | None:
        """The members that open the PG's page; None once the payment has begun."""
        now_ms = self.service.clock.now_ms() if now_ms is None else now_ms
        if order.shown_status(now_ms) not in _UNPAID:
            return None
        customer_key = self.service.order_ids.customer_key(order.buyer_id)
        token = self.token(order, Purpose.RETURN, epoch=epoch, customer_key=customer_key)
        return self.payment_with(customer_key, token)

    def payment_with(self, customer_key: str, token: str) -> PaymentAnswer:
        """The members that open the PG's page for this customer; `token` is the return token."""
        settings = self.service.settings
        base = f"{settings.public_url}/v1/payments/toss"
        return PaymentAnswer(
            provider="toss",
            client_key=settings.toss_client_key,
            customer_key=customer_key,
            success_url=f"{base}/success?token={token}",
            fail_url=f"{base}/fail?token={token}",
            checkout_url=settings.toss_checkout_url or None,
        )

    def shown(self, order: Reservation) -> ReservationAnswer:
        """The reservation without its buyer's private members."""
        return ReservationAnswer.of(order, now_ms=self.service.clock.now_ms())

    async def shown_to_holder(self, order: Reservation) -> ReservationAnswer:
        """The reservation for the holder of one of its tokens, which only its buyer received.

        A card company's app may return into a browser without a buyer's session: that page must
        show the deposit account as well.
        """
        account = await self.service.queries.deposit_account(order)
        return ReservationAnswer.of(order, now_ms=self.service.clock.now_ms(), account=account)

    async def shown_to_buyer(self, order: Reservation) -> ReservationAnswer:
        """The reservation for its own buyer: with the members needed to continue the payment."""
        now_ms = self.service.clock.now_ms()
        if order.shown_status(now_ms) not in _UNPAID:
            return await self.shown_to_holder(order)
        try:
            known = await self.service.catalog.get(order.sale_id)
        except SaleRecovering:
            # SQL still has the order, but it cannot be paid before the sale is rebuilt.
            return self.shown(order)
        payment = self.payment(order, epoch=known.epoch)
        return ReservationAnswer.of(order, now_ms=now_ms, payment=payment)

    def token_claims(self, token: str, order_id: str, *allowed: Purpose) -> Claims:
        """The claims of a presented token that permits this purpose for this order.

        Raises:
            Unauthenticated: the token is not ours, or it has expired.
            ReservationNotFound: it is ours, for another order or another purpose.
        """
        now_ms = self.service.clock.now_ms()
        for purpose in Purpose:
            try:
                claims = self.service.signer.verify(token, purpose, now_ms=now_ms)
            except InvalidToken:
                continue
            matches_order = claims.order_id == order_id and claims.sale_id == ids.sale_of(order_id)
            if purpose not in allowed or not matches_order:
                raise ReservationNotFound
            return claims
        raise Unauthenticated("The token is invalid or has expired.")


def api_of(connection: Connection | Request[Any, Any, State]) -> ApiContext:
    """The context of the application that received this request."""
    return connection.app.state.api


async def known_sale(api: ApiContext, sale_id: str) -> CachedSale:
    """The sale of a buyer's path.

    Raises:
        SaleNotFound: there is none, it is a draft, or the path's text is not a valid sale id.
        SaleRecovering, Unavailable: as `Catalog.get`.
    """
    if SALE_ID.fullmatch(sale_id) is None:
        raise SaleNotFound
    known = await api.service.catalog.get(sale_id)
    if known.sale.visibility is Visibility.DRAFT:
        # It may have been published within the last second, which the cache lacks.
        known = await api.service.catalog.fresh(sale_id)
    if known.sale.visibility is Visibility.DRAFT:
        raise SaleNotFound
    return known


async def requires_buyer(connection: Connection, _: BaseRouteHandler) -> None:
    """Guard: a buyer's own token, or 401."""
    connection.state[_BUYER] = await api_of(connection).buyers.buyer(connection)


def needs(right: Right) -> dict[str, Any]:
    """The `opt` of a route that requires this right of its operator."""
    return {RIGHT: right}


async def requires_operator(
    connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler
) -> None:
    """Guard: an operator's key whose role has the right that the route declares; or 401, 403."""
    right = handler.opt.get(RIGHT)
    if not isinstance(right, Right):
        raise BrokenInvariant(f"{handler} declares no right")
    connection.state[_OPERATOR] = await api_of(connection).operators.admit(connection, right)


def operator_name(request: Request[Any, Any, State]) -> str:
    """The name of the operator that `requires_operator` admitted, recorded with every change.

    Raises:
        MalformedRequest: `X-Operator` is required, and absent or malformed.
    """
    return api_of(request).operators.name(request, operator_of(request))


def operator_of(request: Request[Any, Any, State]) -> Operator:
    """The operator that `requires_operator` admitted."""
    return request.state[_OPERATOR]


def buyer_of(connection: Connection | Request[Any, Any, State]) -> str:
    """The buyer that `requires_buyer` found."""
    return connection.state[_BUYER]
