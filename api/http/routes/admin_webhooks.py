"""The operator's endpoints for webhooks: endpoints, deliveries, tests and replays."""

import re
from typing import Annotated, Any, Literal

from litestar import Controller, Request, delete, get, post, put
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter

from api.http.dependencies import api_of, needs, operator_name, requires_operator
from api.http.problem_details import documented
from api.http.query_parameters import requires_known_query
from api.http.schemas.webhooks import (
    DeliveriesAnswer,
    DeliveryAnswer,
    EndpointAnswer,
    EndpointRequest,
    EndpointsAnswer,
    ReplayRequest,
    SecretEndpointAnswer,
)
from reservation.domain.errors import (
    Forbidden,
    InvalidWebhookEndpoint,
    MalformedRequest,
    Unauthenticated,
    Unavailable,
    WebhookDeliveryNotFound,
    WebhookEndpointDisabled,
    WebhookEndpointNotFound,
)
from reservation.domain.operators import Right

__all__ = ["AdminWebhookController"]

_COMMON = (MalformedRequest, Unauthenticated, Forbidden, Unavailable)
_CURSOR = r"^[0-9]{1,15}$(?!\n)"
_DELIVERY_ID = r"[0-9]{1,15}"


class AdminWebhookController(Controller):
    """Webhook endpoints and the log of their deliveries, for operators."""

    path = "/v1/admin/webhook-endpoints"
    tags = ("Operators",)
    guards = [requires_operator, requires_known_query]
    opt = needs(Right.WEBHOOKS)
    security = [{"operatorKey": []}]

    @post(
        operation_id="createWebhookEndpoint",
        status_code=201,
        responses=documented(*_COMMON, InvalidWebhookEndpoint),
    )
    async def create(
        self, request: Request[Any, Any, Any], data: JSONBody[EndpointRequest]
    ) -> SecretEndpointAnswer:
        """Create an endpoint. Only this response has its secret."""
        api = api_of(request)
        row = await api.service.events.endpoints.create(data.change(), operator_name(request))
        return SecretEndpointAnswer.of(row)

    @get(operation_id="listWebhookEndpoints", responses=documented(*_COMMON))
    async def list_all(self, request: Request[Any, Any, Any]) -> EndpointsAnswer:
        """All endpoints, oldest first."""
        rows = await api_of(request).service.sql.webhooks.list_all()
        return EndpointsAnswer(endpoints=[EndpointAnswer.of(row) for row in rows])

    @get(
        "/{endpoint_id:str}",
        operation_id="getWebhookEndpoint",
        responses=documented(*_COMMON, WebhookEndpointNotFound),
    )
    async def one(
        self, request: Request[Any, Any, Any], endpoint_id: FromPath[str]
    ) -> EndpointAnswer:
        """One endpoint."""
        return EndpointAnswer.of(await api_of(request).service.events.endpoints.get(endpoint_id))

    @put(
        "/{endpoint_id:str}",
        operation_id="putWebhookEndpoint",
        responses=documented(*_COMMON, InvalidWebhookEndpoint, WebhookEndpointNotFound),
    )
    async def change(
        self,
        request: Request[Any, Any, Any],
        endpoint_id: FromPath[str],
        data: JSONBody[EndpointRequest],
    ) -> EndpointAnswer:
        """Replace an endpoint's members. An endpoint that is enabled again continues."""
        api = api_of(request)
        row = await api.service.events.endpoints.change(
            endpoint_id, data.change(), operator_name(request)
        )
        return EndpointAnswer.of(row)

    @delete(
        "/{endpoint_id:str}",
        operation_id="deleteWebhookEndpoint",
        status_code=204,
        responses=documented(*_COMMON, WebhookEndpointNotFound),
    )
    async def remove(self, request: Request[Any, Any, Any], endpoint_id: FromPath[str]) -> None:
        """Delete an endpoint with the log of its deliveries."""
        api = api_of(request)
        await api.service.events.endpoints.remove(endpoint_id, operator_name(request))

    @post(
        "/{endpoint_id:str}/rotate",
        operation_id="rotateWebhookSecret",
        status_code=200,
        responses=documented(*_COMMON, WebhookEndpointNotFound),
    )
    async def rotate(
        self, request: Request[Any, Any, Any], endpoint_id: FromPath[str]
    ) -> SecretEndpointAnswer:
        """Replace the secret; for 24 hours the old one signs as well."""
        api = api_of(request)
        row = await api.service.events.endpoints.rotate(endpoint_id, operator_name(request))
        return SecretEndpointAnswer.of(row)

    @post(
        "/{endpoint_id:str}/test",
        operation_id="testWebhookEndpoint",
        status_code=202,
        responses=documented(*_COMMON, WebhookEndpointNotFound, WebhookEndpointDisabled),
    )
    async def test(
        self, request: Request[Any, Any, Any], endpoint_id: FromPath[str]
    ) -> DeliveryAnswer:
        """Send a webhook of the type `webhook.test`; the log shows its result."""
        api = api_of(request)
        row = await api.service.events.endpoints.test(endpoint_id, operator_name(request))
        return DeliveryAnswer.of(row)

    @get(
        "/{endpoint_id:str}/deliveries",
        operation_id="listWebhookDeliveries",
        responses=documented(*_COMMON, WebhookEndpointNotFound),
    )
    async def deliveries(
        self,
        request: Request[Any, Any, Any],
        endpoint_id: FromPath[str],
        status: FromQuery[Literal["pending", "delivered", "failed"] | None] = None,
        cursor: Annotated[str | None, QueryParameter(pattern=_CURSOR)] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=100)] = 50,
    ) -> DeliveriesAnswer:
        """The log of an endpoint's deliveries, newest first, a page at a time."""
        service = api_of(request).service
        await service.events.endpoints.get(endpoint_id)
        rows = await service.sql.webhooks.page(
            endpoint_id,
            status=status,
            before=int(cursor) if cursor else None,
            limit=limit + 1,
        )
        more = len(rows) > limit
        rows = rows[:limit]
        return DeliveriesAnswer(
            deliveries=[DeliveryAnswer.of(row) for row in rows],
            next_cursor=str(rows[-1].delivery_id) if more else None,
        )

    @post(
        "/{endpoint_id:str}/replay",
        operation_id="replayWebhooks",
        status_code=202,
        responses=documented(*_COMMON, WebhookEndpointNotFound),
    )
    async def replay(
        self,
        request: Request[Any, Any, Any],
        endpoint_id: FromPath[str],
        data: JSONBody[ReplayRequest],
    ) -> EndpointAnswer:
        """Deliver all events after an id of the event feed again."""
        api = api_of(request)
        row = await api.service.events.endpoints.replay(
            endpoint_id, data.after, operator_name(request)
        )
        return EndpointAnswer.of(row)

    @post(
        "/deliveries/{delivery_id:str}/resend",
        operation_id="resendWebhook",
        status_code=202,
        responses=documented(*_COMMON, WebhookDeliveryNotFound, WebhookEndpointDisabled),
    )
    async def resend(
        self, request: Request[Any, Any, Any], delivery_id: FromPath[str]
    ) -> DeliveryAnswer:
        """Deliver once more under the same `webhook-id`."""
        api = api_of(request)
        if re.fullmatch(_DELIVERY_ID, delivery_id) is None:
            raise WebhookDeliveryNotFound
        row = await api.service.events.endpoints.resend(int(delivery_id), operator_name(request))
        return DeliveryAnswer.of(row)
