"""Wire schemas of operators' keys."""

from typing import Annotated

from msgspec import Meta

from api.http.schemas.base import WORDS, RequestModel, ResponseModel
from reservation.adapters.sql.operator_keys import OperatorKeyRecord
from reservation.domain.clock import as_wire
from reservation.domain.operators import NAME_CHARS_MAX, Role

__all__ = [
    "KeyRequest",
    "NewKeyAnswer",
    "OperatorAnswer",
    "OperatorKeyAnswer",
    "OperatorKeysAnswer",
]


class KeyRequest(RequestModel, frozen=True, kw_only=True):
    """A new key of an operator."""

    name: Annotated[
        str,
        Meta(
            min_length=1,
            max_length=NAME_CHARS_MAX,
            pattern=WORDS,
            description="Recorded with every change that is made with the key; in any language.",
        ),
    ]
    role: Role
    reason: Annotated[str, Meta(max_length=200, pattern=WORDS)] = ""


class OperatorAnswer(ResponseModel, frozen=True, kw_only=True):
    """The caller of an operator endpoint."""

    #: The name of the key; null for the admin API key, with which `X-Operator` names the operator.
    name: str | None
    #: viewer, support, manager or owner.
    role: str
    #: read, orders, sales, webhooks, keys: those of the role.
    rights: list[str]


class OperatorKeyAnswer(ResponseModel, frozen=True, kw_only=True):
    """An operator's key, without the key itself."""

    key_id: str
    name: str
    #: viewer, support, manager or owner.
    role: str
    #: The last characters of the key.
    hint: str
    created_at: str
    created_by: str
    #: Why it was created; empty if no reason was given.
    reason: str
    #: Null while the key is valid.
    revoked_at: str | None
    revoked_by: str | None
    revoked_reason: str | None

    @classmethod
    def of(cls, record: OperatorKeyRecord) -> "OperatorKeyAnswer":
        """The key on the wire."""
        return cls(
            key_id=record.key_id,
            name=record.name,
            role=record.role,
            hint=record.hint,
            created_at=as_wire(record.created_at_ms),
            created_by=record.created_by,
            reason=record.reason,
            revoked_at=as_wire(record.revoked_at_ms) if record.revoked_at_ms else None,
            revoked_by=record.revoked_by,
            revoked_reason=record.revoked_reason,
        )


class NewKeyAnswer(OperatorKeyAnswer, frozen=True, kw_only=True):
    """A key that was just created."""

    #: Sent as the bearer token; this answer is the only one that has it.
    key: str


class OperatorKeysAnswer(ResponseModel, frozen=True, kw_only=True):
    """A page of keys, newest first."""

    keys: list[OperatorKeyAnswer]
    #: Of the next page; null at the end.
    next_cursor: str | None
