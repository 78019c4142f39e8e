"""Traces of the whole path: the request, its scripts, the PG; and nothing by default."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from reservation.config.parsing import SettingsError
from reservation.telemetry import tracing
from tests.support.service import Served, eventually, running_service

pytestmark = pytest.mark.system

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Collector(HTTPServer):
    """An operator's trace collector."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[bytes] = []

    def spans(self) -> list[Span]:
        return [
            span
            for body in self.bodies
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def names(self) -> list[str]:
        return [span.name for span in self.spans()]

    def trace_of(self, name: str) -> list[Span]:
        """The spans of the one trace whose first span has this name."""
        spans = self.spans()
        [first] = [one for one in spans if one.name == name and not one.parent_span_id]
        return [one for one in spans if one.trace_id == first.trace_id]


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Keep the output of the tests free of access logs."""


@contextmanager
def collecting() -> Iterator[Collector]:
    with Collector() as collector:
        thread = Thread(target=collector.serve_forever)
        thread.start()
        try:
            yield collector
        finally:
            collector.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Collector]]:
    with (
        collecting() as collector,
        running_service(
            tmp_path_factory.mktemp("traced"),
            RESERVATION_WORKERS="1",
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{collector.server_port}",
            OTEL_BSP_SCHEDULE_DELAY="100",
        ) as served,
    ):
        yield served, collector


def parents(spans: list[Span]) -> dict[str, str]:
    """Each span's name, and its parent's."""
    names = {span.span_id: span.name for span in spans}
    return {span.name: names.get(span.parent_span_id, "") for span in spans}


def facts(spans: list[Span]) -> dict[str, str]:
    return {
        f"{span.name} {fact.key}": fact.value.string_value or str(fact.value.int_value)
        for span in spans
        for fact in span.attributes
    }


def test_a_purchase_is_two_traces_without_secrets(traced: tuple[Served, Collector]) -> None:
    served, collector = traced
    buyer_id, buyer = served.named_buyer()
    order = served.hold(served.sale(), buyer, key="a-wish-of-mine")
    key = served.pay(order)
    assert served.open_success_url(order, key).json()["status"] == "CONFIRMED"
    eventually(collector.names, lambda names: "paymentSucceeded" in names)

    prepared = collector.trace_of("prepareReservation")
    assert parents(prepared) == {
        "prepareReservation": "",
        "prepare batch": "prepareReservation",
        "redis prepare": "prepare batch",
    }
    paid = collector.trace_of("paymentSucceeded")
    assert parents(paid) == {
        "paymentSucceeded": "",
        "redis claim": "paymentSucceeded",
        "pg confirm": "paymentSucceeded",
        "redis finish": "paymentSucceeded",
    }
    attributes = facts(prepared) | facts(paid)
    assert attributes["prepareReservation http.response.status_code"] == "201"
    assert attributes["prepareReservation reservation.order"] == order["orderId"]
    assert attributes["paymentSucceeded reservation.order"] == order["orderId"]
    assert attributes["pg confirm reservation.answer"] == "Answered"

    everything = b"".join(collector.bodies).decode("latin-1")
    bearer = buyer["Authorization"].removeprefix("Bearer ")
    for secret in (key, order["token"], bearer, buyer_id, "a-wish-of-mine", "token="):
        assert secret not in everything


def test_the_span_of_a_refusal_has_the_request_id(
    traced: tuple[Served, Collector],
) -> None:
    served, collector = traced
    refusal = served.prepare("no-such-sale", served.buyer(), amount=1)
    its_id = refusal.json()["instance"]
    eventually(lambda: facts(collector.spans()).values(), lambda values: its_id in values)


@pytest.mark.slow
def test_an_unreachable_collector_does_not_delay_requests(tmp_path: Path) -> None:
    nowhere: dict[str, Any] = {ENDPOINT: "http://127.0.0.1:9"}
    with running_service(tmp_path, RESERVATION_WORKERS="1", **nowhere) as served:
        served.hold(served.sale(), served.buyer())
    assert served.process.returncode == 0
    log = served.log.read_text()
    assert "process_killed" not in log
    assert "process_failed" not in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({ENDPOINT: "http://collector:4318"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({ENDPOINT: "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({ENDPOINT: "http://collector:4318", "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_the_environment_enables_tracing(environ: dict[str, str], expected: bool) -> None:
    assert tracing.wanted(environ) is expected


@pytest.mark.parametrize(
    "more",
    [{"OTEL_TRACES_EXPORTER": "zipkin"}, {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}],
)
def test_unsupported_exporter_settings_are_refused(more: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="must be"):
        tracing.wanted({ENDPOINT: "http://collector:4318", **more})


def test_tracing_libraries_are_imported_only_when_enabled() -> None:
    script = (
        "import sys, api.http.app, api.http.connection.protocol, reservation.workers.runner\n"
        "from reservation.telemetry import tracing\n"
        "tracing.start('api')\n"
        "assert tracing.tracer is None\n"
        # The Redis client imports the API where it is installed; the rest is ours to leave alone.
        "loud = ('reservation.telemetry.spans', 'opentelemetry.sdk.trace',"
        " 'opentelemetry.exporter')\n"
        "sys.exit([name for name in sys.modules if name.startswith(loud)] != [])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env={}, check=False)
    assert done.returncode == 0
