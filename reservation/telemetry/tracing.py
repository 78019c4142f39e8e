"""Traces, off unless the environment asks for them in OpenTelemetry's own words (`OTEL_...`).

What is traced asks `tracing.tracer is None` first, so that nothing is paid where they are off: not
even OpenTelemetry is imported then.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from reservation.config.parsing import SettingsError

if TYPE_CHECKING:
    from reservation.telemetry.spans import Spans

__all__ = ["start", "stop", "wanted"]

#: What makes spans in this process; None while traces are off.
tracer: "Spans | None" = None

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
#: The one protocol whose exporter the extra brings: gRPC is 20 MB more, and says the same.
_PROTOCOL: Final = "http/protobuf"


def wanted(environ: Mapping[str, str]) -> bool:
    """Whether the environment asks for traces, as OpenTelemetry's specification has it.

    Raises:
        SettingsError: it asks for what this service does not have.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    match environ.get("OTEL_TRACES_EXPORTER", "").strip():
        case "none":
            return False
        case "otlp":
            asked = True
        case "":
            asked = any(environ.get(name, "").strip() for name in _ENDPOINTS)
        case _:
            raise SettingsError("OTEL_TRACES_EXPORTER must be otlp or none")
    if asked and any(environ.get(name, _PROTOCOL) not in {"", _PROTOCOL} for name in _PROTOCOLS):
        raise SettingsError(f"OTEL_EXPORTER_OTLP_PROTOCOL must be {_PROTOCOL}")
    return asked


def start(role: str) -> None:
    """Turn traces on in this process where they are asked for.

    Raises:
        SettingsError: they are, and cannot be had.
    """
    global tracer  # noqa: PLW0603 - one for the process, like its log
    if not wanted(os.environ):
        return
    try:
        from reservation.telemetry.spans import exporting  # noqa: PLC0415 - only where asked for
    except ImportError as error:
        raise SettingsError(
            "OTEL_... asks for traces: install stock-reservation[traces], or unset it"
        ) from error
    tracer = exporting(role)


def stop() -> None:
    """Send what is left, within a moment, and turn traces off."""
    global tracer
    if tracer is not None:
        ending, tracer = tracer, None
        ending.close()
