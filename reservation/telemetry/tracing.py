"""Tracing, off unless OpenTelemetry's own variables (`OTEL_...`) turn it on.

Traced code checks `tracing.tracer is None` first, so that disabled tracing costs nothing:
OpenTelemetry is not even imported.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from reservation.config.parsing import SettingsError

if TYPE_CHECKING:
    from reservation.telemetry.spans import Spans

__all__ = ["start", "stop", "wanted"]

#: The tracer of this process; None while tracing is off.
tracer: "Spans | None" = None

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
#: The only protocol with an exporter in the extra: gRPC adds 20 MB and no information.
_PROTOCOL: Final = "http/protobuf"


def wanted(environ: Mapping[str, str]) -> bool:
    """Whether the environment turns tracing on, as OpenTelemetry's specification defines it.

    Raises:
        SettingsError: it requires a feature that this service does not have.
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
    """Turn tracing on in this process if the environment does.

    Raises:
        SettingsError: the environment enables tracing, which is not available.
    """
    global tracer  # noqa: PLW0603 - one for the process, like its log
    if not wanted(os.environ):
        return
    try:
        from reservation.telemetry.spans import exporting  # noqa: PLC0415 - only if enabled
    except ImportError as error:
        raise SettingsError(
            "OTEL_... enables traces: install stock-reservation[traces], or unset it"
        ) from error
    tracer = exporting(role)


def stop() -> None:
    """Export the remaining spans, within a time limit, and turn tracing off."""
    global tracer
    if tracer is not None:
        ending, tracer = tracer, None
        ending.close()
