"""Idempotency keys of the PG's confirm and cancel calls."""

import hashlib

__all__ = ["cancel_key", "confirm_key"]


def confirm_key(payment_key: str, bound_answers: int) -> str:
    """The PG's idempotency key of this attempt's confirm.

    A clean 4xx stays bound to its key for 15 days; another key is used only after such a 4xx and
    a lookup that shows the payment unapproved.
    """
    return f"confirm-{_digest(payment_key)}-{bound_answers}"


def cancel_key(payment_key: str, attempt: int) -> str:
    """The PG's idempotency key of this payment's full cancel.

    The same one for as long as an answer may have been lost; the next one after the PG has answered
    with a clean 4xx, which stays bound to its key.
    """
    return f"cancel-{_digest(payment_key)}" + (f"-{attempt}" if attempt else "")


def _digest(payment_key: str) -> str:
    return hashlib.sha256(payment_key.encode()).hexdigest()[:40]
