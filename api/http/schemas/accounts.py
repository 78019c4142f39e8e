"""Wire schemas of bank accounts: of deposits and of refunds."""

from typing import Annotated

from msgspec import Meta

from api.http.schemas.base import WORDS, RequestModel, ResponseModel
from reservation.adapters.toss.banks import bank_code
from reservation.application.reservations.queries import DepositAccount
from reservation.domain.clock import as_wire
from reservation.domain.payment_gateway import RefundAccount

__all__ = ["RefundAccountAnswer", "RefundAccountRequest", "VirtualAccountAnswer"]


class VirtualAccountAnswer(ResponseModel, frozen=True, kw_only=True):
    """The account that the buyer pays in to."""

    #: The bank's name in Korean, as its app shows it.
    bank: str
    #: The bank's name in English.
    bank_english: str
    account_number: str
    holder_name: str
    due_at: str

    @classmethod
    def of(cls, account: DepositAccount) -> "VirtualAccountAnswer":
        """The account on the wire."""
        return cls(
            bank=account.bank.korean,
            bank_english=account.bank.english,
            account_number=account.account_number,
            holder_name=account.holder_name,
            due_at=as_wire(account.due_at_ms),
        )


class RefundAccountRequest(RequestModel, frozen=True, kw_only=True):
    """The account that a deposit is refunded to."""

    bank: Annotated[
        str,
        Meta(min_length=1, max_length=40, pattern=WORDS, description="the bank's code or name"),
    ]
    account_number: Annotated[str, Meta(pattern="^[0-9]{1,20}$")]
    holder_name: Annotated[str, Meta(min_length=1, max_length=60, pattern=WORDS)]

    def with_bank_code(self) -> RefundAccount:
        """The account in the payment provider's form: a bank by its code."""
        return RefundAccount(
            bank=bank_code(self.bank),
            account_number=self.account_number,
            holder_name=self.holder_name,
        )


class RefundAccountAnswer(ResponseModel, frozen=True, kw_only=True):
    """The account that a deposit is refunded to."""

    #: The payment provider's code of the bank.
    bank: str
    account_number: str
    holder_name: str
