"""Wire format of the buyers: idempotency keys, and the members of an answer."""

import random
import time
from typing import Any, cast

import msgspec

__all__ = ["Answer", "members_of", "new_key"]


class Answer(msgspec.Struct, frozen=True):
    """One decoded answer."""

    status: int
    body: dict[str, Any]

    @property
    def code(self) -> str:
        """The code of a problem document, or nothing."""
        return str(self.body.get("code", ""))


def new_key() -> str:
    """An idempotency key that no other buyer of any run has."""
    return f"load-{time.time_ns():x}-{random.getrandbits(64):x}"


def members_of(content: bytes | None) -> dict[str, Any]:
    """The members of a JSON object; none if the content is something else."""
    try:
        found = msgspec.json.decode(content or b"{}")
    except msgspec.DecodeError:
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
