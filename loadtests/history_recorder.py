"""Recorder of one run for the history checker: polls the sale and writes the history."""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import gevent
import redis
import structlog

from loadtests.operator_api import OperatorApi
from loadtests.recording import Heads, write_history
from reservation.config.settings import Settings
from reservation.verification.model.history_format import Head, Operation
from reservation.verification.model.report import Judgement
from reservation.verification.verify import Unreadable, verify

__all__ = ["NotRecorded", "Recorder"]

log = structlog.get_logger(__name__)

#: Between two polls: bounds a call of some milliseconds to the few events of this time.
OBSERVE_SECONDS: Final = 0.02
#: Two and a half hours of polls; beyond them a refusal is judged less sharply.
HEADS_MAX: Final = 500_000
#: Writing a million events, on a busy machine.
PAST_SECONDS_MAX: Final = 600.0


class NotRecorded(Exception):
    """There is no history, so there is no verdict on it."""


class Recorder:
    """Polls one sale while it runs, and has its history judged at the end.

    Args:
        settings: of the service itself: its Redis is polled, its SQL is read.
        desk: the operator's client, which has the sale's items.
        sale_id: which sale.

    Raises:
        redis.RedisError: the service's Redis is unreachable.
    """

    def __init__(self, settings: Settings, desk: OperatorApi, sale_id: str) -> None:
        skus = [item["sku"] for item in desk.sale(sale_id)["items"]]
        self._sale_id = sale_id
        self._heads = Heads(settings, sale_id, skus)
        self._observations: list[Head] = [self._heads.observe()]

    def watch(self) -> None:
        """Poll until killed."""
        while len(self._observations) < HEADS_MAX:
            try:
                self._observations.append(self._heads.observe())
            except redis.RedisError as error:
                # The buyers meet the same. Without this poll their calls have wider windows.
                log.warning("loadtest_head_not_seen", error=str(error))
            gevent.sleep(OBSERVE_SECONDS)

    def judge(
        self,
        folder: Path,
        operations: Iterable[Operation],
        entries: Iterable[Mapping[str, Any]] | None,
    ) -> Judgement:
        """Write `history.jsonl` and judge it.

        Raises:
            NotRecorded: there is no whole history.
        """
        path = folder / "history.jsonl"
        try:
            past = self._past()
            write_history(
                path, calls=[*operations, *self._observations], past=past, entries=entries
            )
            return verify(path)
        except (OSError, subprocess.SubprocessError, Unreadable) as error:
            raise NotRecorded(f"the history: {error}") from error
        finally:
            self._heads.close()

    def _past(self) -> bytes:
        """The service's history of the sale, written by its own command."""
        command = [sys.executable, "-m", "api.cli", "history", self._sale_id]
        ended = subprocess.run(
            command, capture_output=True, timeout=PAST_SECONDS_MAX, check=False, env=os.environ
        )
        if ended.returncode:
            raise NotRecorded(f"the history: {ended.stderr.decode(errors='replace').strip()}")
        return ended.stdout
