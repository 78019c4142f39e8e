"""What a call may end with instead of an answer.

ClientError
 +- NoAnswer      the network or a proxy failed until the retries were over
 +- Refused       the service said no; `code` is the contract's
     +- SoldOut   BuyerLimitExceeded
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["BuyerLimitExceeded", "ClientError", "NoAnswer", "Refused", "SoldOut", "refusal"]


class ClientError(Exception):
    """A call that did not do what was asked of it."""


class NoAnswer(ClientError):
    """Nobody answered: what became of the call cannot be told.

    A prepare with the same key and body tells it, now or later.
    """


class Refused(ClientError):
    """The service said no.

    Attributes:
        code: the contract's word for it, such as `sale_closed`.
        status: the HTTP status.
        detail: a sentence for people.
        facts: the document's other members, in the wire's camelCase.
        request_id: what to name to whoever runs the service.
    """

    def __init__(self, code: str, status: int, detail: str, facts: Mapping[str, Any]) -> None:
        self.code = code
        self.status = status
        self.detail = detail
        self.facts = facts
        self.request_id = str(facts.get("instance", ""))
        super().__init__(f"{code}: {detail}")


class SoldOut(Refused):
    """Not enough is left: `facts["available"]` says how much of each item."""


class BuyerLimitExceeded(Refused):
    """More than one buyer may have: `facts["orderIds"]` names what they already hold."""


def refusal(code: str, status: int, detail: str, facts: Mapping[str, Any]) -> Refused:
    """The refusal of this code; a class of its own where callers are likely to tell it apart."""
    kind = {"sold_out": SoldOut, "buyer_limit_exceeded": BuyerLimitExceeded}.get(code, Refused)
    return kind(code, status, detail, facts)
