"""Evaluates each row of the table against the facts: closes prepare, warns or stops the start."""

from collections.abc import Collection
from typing import Final

import msgspec

from reservation.application.readiness.conditions import ROWS, Facts, Row, Severity
from reservation.config.settings import SettingsError

__all__ = ["STILL_LOADING", "TRUSTABLE", "Findings", "check_trusted_names", "judge"]

#: Rows measured by us, which no server can hide, and rows of our own scripts.
_MEASURED: Final = {"redis-clock", "redis-clock-jumped", "redis-slow", "redis-scripts"}
#: The names that RESERVATION_REDIS_TRUST accepts.
TRUSTABLE: Final = frozenset(
    row.name for row in ROWS if row.name.startswith("redis-") and row.name not in _MEASURED
)


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """The failed rows of one check, by name."""

    #: Rows that close prepare; a row that the server hides has the suffix `:unknown`.
    missing: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    #: Rows that hold only on an operator's word.
    trusted: tuple[str, ...] = ()
    #: Reasons not to start in production, one sentence each.
    stops: tuple[str, ...] = ()


#: While it loads its file a server refuses almost every command, so no other row can be judged.
STILL_LOADING: Final = Findings(missing=("redis-loading",))


def judge(facts: Facts, *, trusted: Collection[str]) -> Findings:
    """Judge every row.

    Args:
        facts: of one check.
        trusted: rows that an operator vouches for: hidden ones, and waivable ones that the server
            shows to fail.
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


def check_trusted_names(names: Collection[str]) -> None:
    """Refuse to trust a name that is not a row, or a row that must be measured.

    Raises:
        SettingsError: naming the rows that may be trusted.
    """
    for name in names:
        if name not in TRUSTABLE:
            allowed = ", ".join(sorted(TRUSTABLE))
            raise SettingsError(f"RESERVATION_REDIS_TRUST has {name}; allowed: {allowed}")


def _sentence(row: Row, facts: Facts, *, hidden: bool) -> str:
    if hidden:
        return f"{row.name}: the server does not show whether {row.means}"
    if row.name == "redis-user" and facts.excessive:
        return f"{row.name}: {row.means}: {', '.join(facts.excessive)}"
    return f"{row.name}: {row.means}"
