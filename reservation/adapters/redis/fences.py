"""Epochs that fence off a sale: no process uses them, so every script refuses the sale.

restoring:EPOCH             a rebuild; EPOCH is the one that it gives the sale
repairing:TOKEN:EPOCH       a repair writes the events to SQL first
retiring:EPOCH              a retirement
"""

from typing import Final

__all__ = ["REPAIRING_EPOCH", "RESTORING_EPOCH", "RETIRING_EPOCH", "flushed_epoch"]

RESTORING_EPOCH: Final = "restoring:"
REPAIRING_EPOCH: Final = "repairing:"
RETIRING_EPOCH: Final = "retiring:"


def flushed_epoch(epoch: str) -> str:
    """The epoch in SQL of the events of a sale that Redis has under this epoch.

    A repair and a retirement leave the outbox as it is. During a rebuild there are none: the outbox
    may be the one that it replaces.
    """
    if epoch.startswith((REPAIRING_EPOCH, RETIRING_EPOCH)):
        return epoch.rpartition(":")[2]
    return epoch
