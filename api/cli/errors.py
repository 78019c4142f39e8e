"""The failure of a command: one sentence and an exit status."""

from typing import Final

__all__ = ["ALREADY_RUNNING", "BAD_SETTING", "REFUSED", "UNREACHABLE", "CommandError"]

#: A problem was found, or the service refused.
REFUSED: Final = 1
#: The service does not answer (EX_UNAVAILABLE).
UNREACHABLE: Final = 69
#: Another one runs on the same data (EX_TEMPFAIL).
ALREADY_RUNNING: Final = 75
#: A setting cannot be used (EX_CONFIG).
BAD_SETTING: Final = 78


class CommandError(Exception):
    """Ends the command; `api.cli.main` prints the sentence."""

    def __init__(self, reason: Exception | str, status: int = REFUSED) -> None:
        super().__init__(str(reason))
        self.status = status
