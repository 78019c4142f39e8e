"""Fail points: named places between two steps where a test can crash the process.

In production none is armed and `reach` costs one dictionary lookup.
"""

from collections.abc import Callable
from typing import Final

__all__ = ["POINTS", "arm", "disarm", "reach"]

#: Every fail point, in the order in which a payment or a rebuild passes them.
POINTS: Final = (
    "confirm:before_claim",
    "confirm:after_claim",
    "confirm:after_intent",
    "confirm:before_call",
    "confirm:after_call",
    "conclude:before_finish",
    "conclude:after_finish",
    "settle:after_take_over",
    "settle:after_look_up",
    "settle:after_intent",
    "cancel:after_bar",
    "request:after_add",
    "request:after_look_up",
    "request:before_end",
    "refund:after_begin",
    "refund:after_cancel",
    "refund:after_finish",
    "rebuild:after_epoch",
    "rebuild:after_fence",
    "rebuild:after_survivors",
    "rebuild:after_clear",
    "rebuild:after_orders",
    "rebuild:after_outbox",
    "rebuild:after_peers",
    "rebuild:after_claims",
    "rebuild:after_hand_over",
)

_armed: dict[str, Callable[[str], None]] = {}


def reach(point: str, subject: str) -> None:
    """Pass a fail point; an action armed there may raise or end the process."""
    action = _armed.get(point)
    if action is not None:
        action(subject)


def arm(point: str, action: Callable[[str], None]) -> None:
    """Call this action with the order's or the sale's id each time the point is passed."""
    if point not in POINTS:
        raise ValueError(f"{point} is not a failpoint")
    _armed[point] = action


def disarm() -> None:
    """Disarm every fail point."""
    _armed.clear()
