"""The world's clock: the scripts that read it, and after them the real ones again."""

from pathlib import Path

import pytest

from reservation.adapters.redis import scripts
from tests.faults.payments.clock import KEY, scripts_by


def test_patched_scripts_reach_every_caller_and_are_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = scripts.all_scripts()
    with scripts_by(tmp_path, monkeypatch):
        turned = scripts.all_scripts()
        assert turned == tuple(scripts.load(script.name) for script in real)
        assert any(KEY in script.source for script in turned)
    assert scripts.all_scripts() == real == tuple(scripts.load(script.name) for script in real)
