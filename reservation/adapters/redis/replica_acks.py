"""Acknowledgement by replicas: whether one server's changes reach enough of them.

    OPEN --a WAIT returned too few--> SHORT --a probe begins--> PROBING --acknowledged--> OPEN
                                        ^                          |
                                        +------too few, lost-------+

While the state is not OPEN, this process sends the server no new prepare and no claim.

A change waits for every attached replica, not only for the required number. A replica that leaves a
living master may have been promoted: what the others still acknowledge to the old master would be
lost. So the server opens again with fewer replicas than before only after the sentinels or the
other masters had the time to name another one.
"""

from enum import StrEnum
from typing import Any, Final

import structlog

from reservation.domain.clock import Clock

__all__ = [
    "ACK_MS_MAX",
    "ACK_ROW",
    "MEASURE_MS_MAX",
    "PROBE_MS_MAX",
    "SETTLE_SECONDS",
    "AckState",
    "ReplicaAcks",
]

log = structlog.get_logger(__name__)

#: Time-out of the WAIT after a change. A script runs at most `NOT_AFTER_MS` after it was sent, and
#: both end before the socket's time-out.
ACK_MS_MAX: Final = 900
#: Time-out of a probe's WAIT. A replica confirms a write in a round trip; one that has just
#: attached is included in the next probe.
PROBE_MS_MAX: Final = 300
#: Time-out of the WAIT that measures a replica which an open server has gained: as long as that of
#: a change, since changes wait for the replica afterwards.
MEASURE_MS_MAX: Final = ACK_MS_MAX
#: Time after which a failover has moved the other replicas to the new master, and this process has
#: asked for the master's address again.
SETTLE_SECONDS: Final = 3.0
#: Time for which SQL waits for the replicas of a closed server: a failover is over.
OVERDUE_SECONDS: Final = 5.0
#: The row of readiness.
ACK_ROW: Final = "redis-ack-replicas"


class AckState(StrEnum):
    """The states of `ReplicaAcks`."""

    OPEN = "open"
    SHORT = "short"
    PROBING = "probing"


class ReplicaAcks:
    """The state of one server in one process.

    Args:
        wanted: the number of replicas that must acknowledge a change; 0 requires none.
        clock: measures the time since a replica left.
        server: its address, for the log; empty for a single server.
    """

    def __init__(self, wanted: int, *, clock: Clock, server: str = "") -> None:
        self.wanted = wanted
        self.server = server
        self._clock = clock
        # The first probe opens it: a server without replicas never takes a hold.
        self._state = AckState.OPEN if wanted == 0 else AckState.SHORT
        #: Rises whenever too few replicas acknowledged: a probe that began before does not count.
        self._shortfalls = 0
        #: Whether the last change or probe was acknowledged by too few; false while unknown.
        self.is_short = False
        #: The replicas that acknowledged one change together, and the time when one left.
        self._attached = 0
        self._left_at = float("-inf")
        #: Since when the server is closed.
        self._closed_at = float("-inf")
        #: The fewest replicas that acknowledged a write since the server was closed.
        self._fewest: int | None = None
        #: The replicas that the server listed last.
        self._listed = 0
        self._address: str = ""

    @property
    def state(self) -> AckState:
        """The present state."""
        return self._state

    @property
    def is_open(self) -> bool:
        """Whether prepares and claims may be sent."""
        return self._state is AckState.OPEN

    @property
    def is_overdue(self) -> bool:
        """Whether to wait for replicas no longer; always, where none must acknowledge."""
        if self.is_open:
            return self.wanted == 0
        return self._clock.monotonic() - self._closed_at >= OVERDUE_SECONDS

    @property
    def needs_probe(self) -> bool:
        """Whether a probe must begin."""
        return self._state is AckState.SHORT

    @property
    def asked(self) -> int:
        """The replicas for which a change waits: all that are attached."""
        return max(self.wanted, self._attached)

    def suffices(self, count: Any, asked: int) -> bool:
        """Whether this reply of WAIT confirms the change; too few close the server.

        Args:
            count: the reply; an error reply confirms nothing.
            asked: the replicas for which the change waited; one may have joined since.
        """
        if isinstance(count, int) and count >= asked:
            # More replicas than requested acknowledged: the next change waits for them, too.
            self.note_attached(count)
            return True
        if self.is_open and isinstance(count, int) and self.asked <= count:
            # Sent before a probe opened the server without a replica that has left.
            return False
        if self.is_open:
            # The readiness row raises the alarm.
            log.warning(
                "replicas_short",
                server=self.server,
                acknowledged=count if isinstance(count, int) else str(count),
                wanted=self.wanted,
                attached=self._attached,
            )
            self.fall_short()
        elif not isinstance(count, int) or count < self._required():
            # A probe that is acknowledged by as many would open the server; it must not be
            # dropped for a call that missed only the replica that has left.
            self._close()
        if isinstance(count, int):
            self._note_acknowledged(count)
        return False

    def fall_short(self) -> None:
        """Require a probe before the next prepare: a replica has left."""
        if self.wanted == 0:
            return
        if self.is_open:
            self._left_at = self._closed_at = self._clock.monotonic()
            self._fewest = None
        self._close()
        self.is_short = True

    def begin_life(self, address: str) -> None:
        """Require a probe before the next prepare: a life of a server was vouched for.

        Args:
            address: of the server. A restarted server may have been replaced meanwhile.
        """
        if self.wanted == 0:
            return
        self._left_at = self._closed_at = self._clock.monotonic()
        if address != self._address:
            # It has replicas of its own.
            self._address = address
            self._attached = self._listed = 0
        self._fewest = None
        self._close()

    def _close(self) -> None:
        self._shortfalls += 1
        self._state = AckState.SHORT

    def begin_probe(self) -> int:
        """Begin a probe; returns its ticket for `end_probe`."""
        if self._state is not AckState.SHORT:
            raise RuntimeError(f"a probe begins in the state {self._state}")
        self._state = AckState.PROBING
        return self._shortfalls

    def end_probe(self, ticket: int, count: Any) -> None:
        """End a probe.

        Args:
            ticket: from `begin_probe`.
            count: the reply of its WAIT; None if there was none.
        """
        if self._state is not AckState.PROBING or ticket != self._shortfalls:
            # Closed since: the probe says nothing about the later change.
            return
        if isinstance(count, int):
            self._note_acknowledged(count)
        if isinstance(count, int) and count >= self._required():
            self._state, self.is_short = AckState.OPEN, False
            self._attached = count
            log.info("replicas_acknowledge", server=self.server, acknowledged=count)
        else:
            self._state, self.is_short = AckState.SHORT, True

    def _note_acknowledged(self, count: int) -> None:
        """Note another replica that left while the server is closed; it may be promoted as well.

        One that comes and goes counts once, so that it does not keep the server closed.
        """
        if self._fewest is not None and count < self._fewest:
            self._left_at = self._clock.monotonic()
        self._fewest = count if self._fewest is None else min(count, self._fewest)

    def _required(self) -> int:
        """The acknowledgements that open the server now."""
        settled = self._clock.monotonic() - self._left_at >= SETTLE_SECONDS
        return self.wanted if settled else self.probed

    @property
    def probed(self) -> int:
        """The replicas for which a probe waits: those that are listed as well."""
        return max(self.asked, self._listed)

    @property
    def needs_measuring(self) -> bool:
        """Whether the server lists replicas for which changes do not wait yet."""
        return self.is_open and self.wanted > 0 and self._listed > self._attached

    def note_listed(self, count: int) -> None:
        """Note how many replicas the server lists as online."""
        self._listed = count

    def note_attached(self, count: Any) -> None:
        """Wait for one more replica from now on: this many acknowledged a change together."""
        if self.is_open and isinstance(count, int):
            self._attached = max(self._attached, count)
