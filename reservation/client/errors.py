"""The errors of a call.

ClientError
 +- NoAnswer      the network or a proxy failed until the retries were over
 +- Refused       the service refused the call; `code` is the contract's
     +- SoldOut   BuyerLimitExceeded
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["BuyerLimitExceeded", "ClientError", "NoAnswer", "Refused", "SoldOut", "refusal"]


class ClientError(Exception):
    """A call that failed."""


class NoAnswer(ClientError):
    """No answer arrived: the outcome of the call is unknown.

    A prepare with the same key and body returns it, now or later.
    """


class Refused(ClientError):
    """The service refused the call.

    Attributes:
        code: the contract's code, such as `sale_closed`.
        status: the HTTP status.
        detail: a sentence for people.
        facts: the document's other members, in the wire's camelCase.
        request_id: for a report to the operator of the service.
    """

    def __init__(self, code: str, status: int, detail: str, facts: Mapping[str, Any]) -> None:
        self.code = code
        self.status = status
        self.detail = detail
        self.facts = facts
        self.request_id = str(facts.get("instance", ""))
        super().__init__(f"{code}: {detail}")


class SoldOut(Refused):
    """Not enough is left: `facts["available"]` has the number left of each item."""


class BuyerLimitExceeded(Refused):
    """Over the limit of one buyer: `facts["orderIds"]` lists the orders that count."""


def refusal(code: str, status: int, detail: str, facts: Mapping[str, Any]) -> Refused:
    """The refusal of this code; codes that callers often handle have their own class."""
    kind = {"sold_out": SoldOut, "buyer_limit_exceeded": BuyerLimitExceeded}.get(code, Refused)
    return kind(code, status, detail, facts)
