"""The operator's own role, and the owner's endpoints for operators' keys."""

from typing import Annotated, Any

import msgspec
from litestar import Controller, Request, Response, delete, get, post
from litestar.params import FromPath, JSONBody, QueryParameter

from api.http.dependencies import (
    PRIVATE,
    api_of,
    needs,
    operator_name,
    operator_of,
    requires_operator,
)
from api.http.problem_details import documented
from api.http.query_parameters import requires_known_query
from api.http.schemas.base import WORDS
from api.http.schemas.operators import (
    KeyRequest,
    NewKeyAnswer,
    OperatorAnswer,
    OperatorKeyAnswer,
    OperatorKeysAnswer,
)
from reservation.domain.errors import (
    Forbidden,
    KeyNotFound,
    MalformedRequest,
    TooManyKeys,
    Unauthenticated,
    Unavailable,
)
from reservation.domain.operators import RIGHTS, Right, valid_name

__all__ = ["AdminKeyController"]

_COMMON = (MalformedRequest, Unauthenticated, Forbidden, Unavailable)


class AdminKeyController(Controller):
    """The caller's role; operators' keys, for owners."""

    path = "/v1/admin"
    tags = ("Operators",)
    guards = [requires_operator, requires_known_query]
    security = [{"operatorKey": []}]

    @get(
        "/operator",
        operation_id="getOperator",
        opt=needs(Right.READ),
        responses=documented(*_COMMON),
    )
    async def operator(self, request: Request[Any, Any, Any]) -> OperatorAnswer:
        """The caller: the name and role of its key, and the rights of that role."""
        operator = operator_of(request)
        return OperatorAnswer(
            name=operator.name,
            role=operator.role.value,
            rights=[right.value for right in Right if right in RIGHTS[operator.role]],
        )

    @post(
        "/keys",
        operation_id="createKey",
        opt=needs(Right.KEYS),
        responses=documented(*_COMMON, TooManyKeys),
    )
    async def create(
        self, request: Request[Any, Any, Any], data: JSONBody[KeyRequest]
    ) -> Response[NewKeyAnswer]:
        """Create an operator's key. Only this answer has the key: SQL keeps its hash."""
        name = valid_name(data.name)
        if name is None:
            raise MalformedRequest("name must not begin or end with white space.")
        record, key = await api_of(request).operators.keys.create(
            name=name, role=data.role, reason=data.reason, operator=operator_name(request)
        )
        shown = msgspec.structs.asdict(OperatorKeyAnswer.of(record))
        return Response(NewKeyAnswer(**shown, key=key), headers=PRIVATE)

    @get("/keys", operation_id="listKeys", opt=needs(Right.KEYS), responses=documented(*_COMMON))
    async def keys(
        self,
        request: Request[Any, Any, Any],
        cursor: Annotated[str | None, QueryParameter(max_length=256)] = None,
        limit: Annotated[int, QueryParameter(ge=1, le=100)] = 50,
    ) -> OperatorKeysAnswer:
        """Valid and revoked keys, newest first, a page at a time; never the keys themselves."""
        try:
            records, next_cursor = await api_of(request).service.sql.operator_keys.page(
                cursor=cursor, limit=limit
            )
        except ValueError as error:
            raise MalformedRequest("cursor was not issued by this endpoint.") from error
        return OperatorKeysAnswer(
            keys=[OperatorKeyAnswer.of(record) for record in records], next_cursor=next_cursor
        )

    @delete(
        "/keys/{key_id:str}",
        operation_id="revokeKey",
        status_code=200,
        opt=needs(Right.KEYS),
        responses=documented(*_COMMON, KeyNotFound),
    )
    async def revoke(
        self,
        request: Request[Any, Any, Any],
        key_id: FromPath[str],
        reason: Annotated[str, QueryParameter(max_length=200, pattern=WORDS)] = "",
    ) -> OperatorKeyAnswer:
        """Revoke a key: every process refuses it within five seconds. Its row stays listed."""
        revoked = await api_of(request).operators.keys.revoke(
            key_id, reason=reason, operator=operator_name(request)
        )
        return OperatorKeyAnswer.of(revoked)
