"""Limits on event streams: a process derives its limit from its limit of open files."""

from typing import Any, cast

import pytest

from api.http import open_files
from api.http.routes.sales import StockFeed
from reservation.domain.errors import Unavailable


def test_streams_use_at_most_half_of_the_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = StockFeed(cast("Any", None))
    monkeypatch.setattr(open_files, "limit", lambda: 8)
    monkeypatch.setattr(feed, "_count", 3)
    feed.check("")
    monkeypatch.setattr(feed, "_count", 4)
    with pytest.raises(Unavailable) as refused:
        feed.check("")
    assert refused.value.facts["retryAfter"]
