"""Each row of the table against what was read: what closes prepare, what only warns, what stops."""

from collections.abc import Collection
from typing import Final

import msgspec

from reservation.application.readiness.conditions import ROWS, Facts, Row, Severity
from reservation.config.settings import SettingsError

__all__ = ["STILL_LOADING", "TRUSTABLE", "Findings", "judge", "refuse_strange"]

#: What is measured here, so that no server can hide it; or is of ours, like the scripts.
_MEASURED: Final = {"redis-clock", "redis-clock-jumped", "redis-slow", "redis-scripts"}
#: What RESERVATION_REDIS_TRUST may name.
TRUSTABLE: Final = frozenset(
    row.name for row in ROWS if row.name.startswith("redis-") and row.name not in _MEASURED
)


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """What one look found, each by the name of its row."""

    #: What closes prepare; what the server hides has `:unknown` behind its name.
    missing: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    #: What holds only because an operator said so.
    trusted: tuple[str, ...] = ()
    #: What keeps the service from starting in production: a sentence each.
    stops: tuple[str, ...] = ()


#: Until it has read its file, a server refuses almost every question: there is no more to judge.
STILL_LOADING: Final = Findings(missing=("redis-loading",))


def judge(facts: Facts, *, trusted: Collection[str]) -> Findings:
    """Every row.

    Args:
        facts: what was read.
        trusted: rows that an operator vouches for: where the server hides them, or where they are
            waivable and it shows that they do not hold.
    """
    missing: list[str] = []
    warnings: list[str] = []
    vouched_for: list[str] = []
    stops: list[str] = []
    for row in ROWS:
        holds = row.holds(facts)
        if holds:
            continue
        if row.name in trusted and (holds is None or row.waivable):
            vouched_for.append(row.name)
            continue
        name = row.name if holds is False else f"{row.name}:unknown"
        (warnings if row.severity is Severity.WARN else missing).append(name)
        if row.severity is Severity.STOP:
            stops.append(_sentence(row, facts, hidden=holds is None))
    return Findings(
        missing=tuple(missing),
        warnings=tuple(warnings),
        trusted=tuple(vouched_for),
        stops=tuple(stops),
    )


def refuse_strange(names: Collection[str]) -> None:
    """Refuse to trust what is no row, or must be seen.

    Raises:
        SettingsError: naming what may be trusted.
    """
    for name in names:
        if name not in TRUSTABLE:
            allowed = ", ".join(sorted(TRUSTABLE))
            raise SettingsError(f"RESERVATION_REDIS_TRUST has {name}; it takes {allowed}")


def _sentence(row: Row, facts: Facts, *, hidden: bool) -> str:
    if hidden:
        return f"{row.name}: the server does not show whether {row.means}"
    if row.name == "redis-user" and facts.excessive:
        return f"{row.name}: {row.means}: {', '.join(facts.excessive)}"
    return f"{row.name}: {row.means}"
