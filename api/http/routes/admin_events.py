"""The operator's event feed."""

from typing import Annotated, Any

from litestar import Controller, Request, get
from litestar.params import QueryParameter

from api.http.dependencies import api_of, needs, requires_operator
from api.http.problem_details import documented
from api.http.query_parameters import requires_known_query
from api.http.schemas.events import EventsAnswer
from reservation.domain.errors import Forbidden, MalformedRequest, Unauthenticated, Unavailable
from reservation.domain.ids import SALE_ID
from reservation.domain.operators import Right

__all__ = ["AdminEventController"]

_COMMON = (MalformedRequest, Unauthenticated, Forbidden, Unavailable)
#: Events of one page: about 1 MB.
_LIMIT_MAX = 1_000
#: Longest wait, below the idle time-out of common proxies (30 s).
_WAIT_SECONDS_MAX = 25
#: The largest integer that JSON carries exactly.
_ID_MAX = 2**53 - 1


class AdminEventController(Controller):
    """Every change of every sale, for the shop's own systems."""

    path = "/v1/admin"
    tags = ("Operators",)
    guards = [requires_operator, requires_known_query]
    opt = needs(Right.READ)
    security = [{"operatorKey": []}]

    @get("/events", operation_id="listEvents", responses=documented(*_COMMON))
    async def events(
        self,
        request: Request[Any, Any, Any],
        after: Annotated[
            int, QueryParameter(ge=0, le=_ID_MAX, description="`next` of the previous page.")
        ] = 0,
        sale_id: Annotated[str | None, QueryParameter(name="saleId", pattern=SALE_ID)] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=_LIMIT_MAX)] = 100,
        wait: Annotated[
            int,
            QueryParameter(
                ge=0,
                le=_WAIT_SECONDS_MAX,
                description="Seconds to wait for an event if there is none yet.",
            ),
        ] = 0,
    ) -> EventsAnswer:
        """Events from SQL in an order that never changes, a page at a time; none is skipped."""
        page = await api_of(request).service.events.feed.next_page(
            after=after, limit=limit, sale_id=sale_id, wait_seconds=wait
        )
        return EventsAnswer.of(page)
