"""Log output and redaction: JSON in production, readable otherwise, no secrets.

A line that cannot be written (a full disk, a closed pipe) raises no error in the code that logs.
The next line that can be written carries the number of failed writes.
"""

import logging
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, Final, TextIO, cast

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

__all__ = ["configure", "redact"]

#: Maximum depth of redaction; deeper values are removed as a whole.
_DEPTH_MAX: Final = 6

#: Replaces a secret.
_HIDDEN: Final = "[hidden]"

#: Logged characters of a payment key: enough for support to find it, as in the PG's consoles.
_KEY_TAIL_CHARS: Final = 4

#: A key whose name contains one of these, in any case and with or without - and _, is a secret.
_SECRET_WORDS: Final = (
    "token",
    "authorization",
    "secret",
    "password",
    "cookie",
    "apikey",
    "signingkey",
    "orderidkey",
    "idempotencykey",
    "admission",
    "jwt",
)

#: Secrets inside a text: a query, a header, the userinfo of an address.
_SECRET_IN_QUERY = re.compile(r"(?i)([?&;](?:[a-z_-]*token|secret|admission)=)[^&\s\"'#]+")
_PAYMENT_KEY_IN_QUERY = re.compile(
    r"(?i)([?&;]payment_?key=)[^&\s\"'#]*?([^&\s\"'#]{1,4})(?=[&\s\"'#]|$)"
)
_IN_TEXT: Final = (
    (_SECRET_IN_QUERY, rf"\1{_HIDDEN}"),
    (_PAYMENT_KEY_IN_QUERY, r"\1...\2"),
    (re.compile(r"(?i)\b(bearer|basic)(\s+)[a-z0-9._~+/=-]{8,}"), rf"\1\2{_HIDDEN}"),
    (re.compile(r"(://[^/\s:@]*):[^/\s@]+@"), rf"\1:{_HIDDEN}@"),
    (re.compile(r"\b((?:test|live)_g?sk_)[A-Za-z0-9]+"), rf"\1{_HIDDEN}"),
)

#: Libraries whose INFO lines are of no use here, or (httpx) contain URLs with keys.
_QUIET: Final = (
    "alembic",
    "asyncio",
    "httpcore",
    "httpx",
    "sqlalchemy",
    "uvicorn",
    "uvicorn.error",
)


class _ResilientStream:
    """A stream that counts failed writes instead of raising into a payment that logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        #: Failed writes since the last successful one.
        self.failures = 0

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            self.failures += 1
        else:
            self.failures = 0
        return len(text)

    def flush(self) -> None:
        """Does nothing: each write is flushed."""

    def report_failures(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        """A processor: adds the number of lines lost before this one."""
        if self.failures:
            event["log_write_failures"] = self.failures
        return event


def configure(*, production: bool, stream: TextIO | None = None) -> None:
    """Send everything, the libraries' own lines included, to stderr in one form.

    Args:
        production: JSON, one object a line; else text, coloured on a terminal.
        stream: stderr by default.
    """
    target = stream or sys.stderr
    resilient = _ResilientStream(target)
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    after: list[Processor] = [
        structlog.processors.format_exc_info,
        redact,
        resilient.report_failures,
        _json() if production else _text(target),
    ]
    structlog.configure(
        processors=[*before, *after],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", resilient)),
        cache_logger_on_first_use=True,
    )
    _configure_libraries(resilient, before, after)


def _configure_libraries(
    target: _ResilientStream, before: list[Processor], after: list[Processor]
) -> None:
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*before, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *after],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def _json() -> Processor:
    def encode(event: EventDict, **_: object) -> str:
        return msgspec.json.encode(event, enc_hook=repr).decode()

    return structlog.processors.JSONRenderer(serializer=encode)


def _text(target: TextIO) -> Processor:
    # The exception is text by now; https://no-color.org asks for any value that is not empty.
    return structlog.dev.ConsoleRenderer(
        colors=target.isatty() and not os.environ.get("NO_COLOR"), pad_event_to=0
    )


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Hide secrets, by the name of their key and by their form in a text."""
    return {name: _clean(name, value, depth=0) for name, value in event.items()}


def _clean(name: str, value: object, *, depth: int) -> object:
    plain = name.replace("-", "").replace("_", "").lower()
    if "paymentkey" in plain and isinstance(value, str):
        return f"...{value[-_KEY_TAIL_CHARS:]}" if len(value) > 2 * _KEY_TAIL_CHARS else _HIDDEN
    if any(word in plain for word in _SECRET_WORDS) and not isinstance(value, bool | int | None):
        return _HIDDEN
    if isinstance(value, str):
        return _clean_text(value)
    if isinstance(value, bytes):
        return _clean_text(value.decode(errors="replace"))
    if value is None or isinstance(value, bool | int | float):
        return value
    if depth >= _DEPTH_MAX:
        return _HIDDEN
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value).items()
        return {str(key): _clean(str(key), inner, depth=depth + 1) for key, inner in pairs}
    if isinstance(value, list | tuple | set | frozenset):
        members = cast("list[Any]", value)
        return [_clean(name, inner, depth=depth + 1) for inner in members]
    return _clean_text(repr(value))


def _clean_text(text: str) -> str:
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text
