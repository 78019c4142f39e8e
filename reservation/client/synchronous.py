"""Former name of `reservation.client.client`; removed after release 0.2."""

import warnings

from reservation.client.client import Client

__all__ = ["Client"]

warnings.warn(
    "reservation.client.synchronous is now client; import from reservation.client",
    DeprecationWarning,
    stacklevel=2,
)
