"""Level of an installation: the forms of records that its processes may write.

Neighbouring releases run side by side at the level of the older one. An operator raises the level
once no older process runs; from then on the newer forms may be written.
"""

from typing import Final

__all__ = ["HIGHEST_LEVEL", "LEVEL_OF_0_1_0", "LEVEL_OF_RETIREMENT"]

#: Release 0.1.0 has no levels, and names none in its heartbeats.
LEVEL_OF_0_1_0: Final = 1

#: Release 0.1.0 takes a retired sale for a lost one.
LEVEL_OF_RETIREMENT: Final = 2

#: The highest level that this version supports; a new installation starts at it.
HIGHEST_LEVEL: Final = 2
