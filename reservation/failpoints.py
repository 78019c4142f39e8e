"""Fail points: named places between two steps of a payment where a test can crash the process.

In production none is armed and `reach` costs one dictionary lookup.
"""

from collections.abc import Callable
from typing import Final

__all__ = ["POINTS", "arm", "disarm", "reach"]

#: Every fail point, in the order in which a payment passes them.
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
    "refund:after_begin",
    "refund:after_cancel",
    "refund:after_finish",
)

_armed: dict[str, Callable[[str], None]] = {}


def reach(point: str, order_id: str) -> None:
    """Pass a fail point; an action armed there may raise or end the process."""
    action = _armed.get(point)
    if action is not None:
        action(order_id)


def arm(point: str, action: Callable[[str], None]) -> None:
    """Call this action with the order's id each time the point is passed."""
    if point not in POINTS:
        raise ValueError(f"{point} is not a failpoint")
    _armed[point] = action


def disarm() -> None:
    """Disarm every fail point."""
    _armed.clear()
