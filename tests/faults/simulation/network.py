"""Simulated network: the latency of messages, and their fate."""

import random
from enum import Enum

import msgspec

__all__ = ["Fate", "Link", "Weather"]


class Fate(Enum):
    """The fate of one exchange."""

    WELL = "well"
    #: The request never arrives; the caller waits for its own time-out.
    REQUEST_LOST = "request_lost"
    #: It arrives and is done; the reply never comes.
    REPLY_LOST = "reply_lost"
    #: The connection breaks before the request arrives, and the caller gets the error at once.
    RESET = "reset"
    #: The connection breaks when it is done, and the caller gets the error at once.
    RESET_AFTER = "reset_after"


_FAULTS = (Fate.REQUEST_LOST, Fate.REPLY_LOST, Fate.RESET, Fate.RESET_AFTER)


class Link(msgspec.Struct, kw_only=True):
    """The network to one kind of server."""

    #: Mean one-way latency, in seconds; drawn exponentially.
    delay: float
    #: Share of exchanges that fail, 0 to 1.
    bad: float = 0.0
    #: Share of very late messages, 0 to 1, and their maximum delay in seconds.
    late: float = 0.0
    late_seconds: float = 0.0

    def seconds(self, draw: random.Random) -> float:
        """The latency of one message."""
        usual = self.delay * (0.5 + draw.random())
        if self.late and draw.random() < self.late:
            return usual + draw.random() * self.late_seconds
        return usual

    def fate(self, draw: random.Random) -> Fate:
        """The fate of the next exchange."""
        if self.bad and draw.random() < self.bad:
            return draw.choice(_FAULTS)
        return Fate.WELL


class Weather(msgspec.Struct, kw_only=True):
    """All links of a world. For the faults of SQL see `tests.faults.simulation.sql`."""

    redis: Link
    sql: Link
    pg: Link
    web: Link

    @classmethod
    def fair(cls) -> "Weather":
        """No faults."""
        return cls(
            redis=Link(delay=0.0005),
            sql=Link(delay=0.001),
            pg=Link(delay=0.05),
            web=Link(delay=0.01),
        )

    def clear(self) -> None:
        """Remove all faults."""
        for link in (self.redis, self.sql, self.pg, self.web):
            link.bad = link.late = 0.0
