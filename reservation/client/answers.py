"""Former name of `reservation.client.models`; removed after release 0.2."""

import warnings

from reservation.client.models import (
    Guest,
    Item,
    Line,
    Payment,
    Reservation,
    Reservations,
    Sale,
    Sales,
    VirtualAccount,
)

__all__ = [
    "Guest",
    "Item",
    "Line",
    "Payment",
    "Reservation",
    "Reservations",
    "Sale",
    "Sales",
    "VirtualAccount",
]

warnings.warn(
    "reservation.client.answers is now models; import from reservation.client",
    DeprecationWarning,
    stacklevel=2,
)
