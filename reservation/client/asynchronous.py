"""Former name of `reservation.client.async_client`; removed after release 0.2."""

import warnings

from reservation.client.async_client import AsyncClient

__all__ = ["AsyncClient"]

warnings.warn(
    "reservation.client.asynchronous is now async_client; import from reservation.client",
    DeprecationWarning,
    stacklevel=2,
)
