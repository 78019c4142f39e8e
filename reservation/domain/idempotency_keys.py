"""The idempotency keys under which the PG is asked to move money."""

import hashlib

__all__ = ["cancel_key", "confirm_key"]


def confirm_key(payment_key: str, bound_answers: int) -> str:
    """The PG's idempotency key of this attempt's confirm.

    A clean 4xx stays bound to its key for 15 days; only after one of those, and a look-up that
    shows the payment unapproved, another key is used.
    """
    return f"confirm-{_digest(payment_key)}-{bound_answers}"


def cancel_key(payment_key: str, attempt: int) -> str:
    """The PG's idempotency key of this payment's full cancel.

    The same one for as long as an answer may have been lost; the next one where the PG has answered
    with a clean 4xx, which stays bound to the key that it came under.
    """
    return f"cancel-{_digest(payment_key)}" + (f"-{attempt}" if attempt else "")


def _digest(payment_key: str) -> str:
    return hashlib.sha256(payment_key.encode()).hexdigest()[:40]
