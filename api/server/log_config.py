"""Where log lines go and what they may say: JSON in production, readable otherwise, no secrets.

A line that cannot be written, since the disk is full or whoever read it has gone, is no error of
whoever logs: the next one that can be written says how many writes had failed.
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

#: How deep nested values are looked through; below it they are left out whole.
_DEPTH_MAX: Final = 6

#: What stands where a secret stood.
_HIDDEN: Final = "[hidden]"

#: How much of a payment key is told: enough for support to find it, the PG's consoles show it too.
_KEY_TAIL_CHARS: Final = 4

#: A key whose name holds one of these, in any case and with or without - and _, is a secret.
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

#: The same where a text carries them: a query, a header, the user of an address.
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

#: Libraries whose INFO is about themselves, or (httpx) holds whole addresses with their keys.
_QUIET: Final = (
    "alembic",
    "asyncio",
    "httpcore",
    "httpx",
    "sqlalchemy",
    "uvicorn",
    "uvicorn.error",
)


class _Lasting:
    """A stream whose failures are counted instead of raised into a payment that logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        #: Writes that failed since the last one that did not.
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
        """Nothing is ever left to be written."""

    def tell_failures(self, _logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        """A processor: what is missing before this line."""
        if self.failures:
            event["log_write_failures"] = self.failures
        return event


def configure(*, production: bool, stream: TextIO | None = None) -> None:
    """Send everything, the libraries' own lines included, to stderr in one form.

    Args:
        production: JSON, one object a line; else text, coloured where the stream is a terminal.
        stream: stderr where absent.
    """
    target = stream or sys.stderr
    lasting = _Lasting(target)
    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    after: list[Processor] = [
        structlog.processors.format_exc_info,
        redact,
        lasting.tell_failures,
        _json() if production else _text(target),
    ]
    structlog.configure(
        processors=[*before, *after],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", lasting)),
        cache_logger_on_first_use=True,
    )
    _configure_libraries(lasting, before, after)


def _configure_libraries(target: _Lasting, before: list[Processor], after: list[Processor]) -> None:
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
    """Hide what must never be in a log, by the name of its key and by its form in a text."""
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
