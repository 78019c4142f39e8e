"""Configuration of a sandbox."""

from pathlib import Path

import msgspec

__all__ = ["SandboxConfig"]


class SandboxConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Host and port belong to the process that runs the sandbox."""

    #: Directory of the journal. A sandbox that starts on it resumes the last one's state.
    journal_dir: Path
    secret_key: str = "test_gsk_sandbox"  # noqa: S105 - it opens nothing but the sandbox
    client_key: str = "test_gck_sandbox"
    #: Each gets every event, as with a PG where all events are registered for it.
    webhook_urls: tuple[str, ...] = ()
    #: Minimum and maximum latency of the PG's own endpoints.
    latency_ms: tuple[int, int] = (0, 0)
    #: Factor on the pauses between the tries of a webhook: 1 is the PG's own, minutes to days.
    webhook_scale: float = 1.0

    def __repr__(self) -> str:
        return f"SandboxConfig(journal_dir={self.journal_dir})"
