"""Level of an installation: the record formats that its processes may write.

Consecutive releases run side by side at the level of the older one. An operator raises the level
once no older process runs; from then on newer formats may be written.
"""

from typing import Final

__all__ = [
    "HIGHEST_LEVEL",
    "LEVEL_OF_0_1_0",
    "LEVEL_OF_AUTOMATIC_REBUILD",
    "LEVEL_OF_PRESENTATION",
    "LEVEL_OF_RETIREMENT",
    "LEVEL_OF_TOMBSTONES",
]

#: Release 0.1.0 does not support levels and writes none into its heartbeats.
LEVEL_OF_0_1_0: Final = 1

#: Release 0.1.0 would treat a retired sale as lost.
LEVEL_OF_RETIREMENT: Final = 2

#: After a rebuild, a flusher of release 0.1.0 may write a batch that it read before.
LEVEL_OF_AUTOMATIC_REBUILD: Final = 2

#: Release 0.1.0 would treat an order with a tombstone as one that never existed.
LEVEL_OF_TOMBSTONES: Final = 2

#: Release 0.1.0 would sell a draft, and drop texts and pictures with the next change of the sale.
LEVEL_OF_PRESENTATION: Final = 2

#: The highest level that this version supports; a new installation starts at it.
HIGHEST_LEVEL: Final = 2
