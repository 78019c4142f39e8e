"""Spans: the attributes of one span for many requests, and of a failure."""

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from reservation.telemetry.spans import Spans


@pytest.fixture
def kept() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(kept: InMemorySpanExporter) -> Spans:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    return Spans(provider, close=provider.shutdown)


def test_a_batch_span_joins_the_first_trace_and_links_the_others(
    spans: Spans, kept: InMemorySpanExporter
) -> None:
    requests = [spans.request(f"request-{number}") for number in range(3)]
    callers = [None, *(request.get_span_context() for request in requests)]
    with spans.batch("prepare batch", callers, baskets=4), spans.step("redis prepare"):
        pass
    call, batch = kept.get_finished_spans()
    first, *others = (request.get_span_context() for request in requests)
    assert batch.parent == first
    assert [link.context for link in batch.links] == others
    assert call.parent == batch.get_span_context()
    assert dict(batch.attributes or {}) == {"reservation.baskets": 4}


def test_work_without_a_traced_request_creates_no_span(
    spans: Spans, kept: InMemorySpanExporter
) -> None:
    with spans.batch("prepare batch", [None, None]), spans.step("redis expire"):
        pass
    assert kept.get_finished_spans() == ()


def test_a_span_records_only_the_type_of_an_error(spans: Spans, kept: InMemorySpanExporter) -> None:
    with pytest.raises(ConnectionError), spans.root("settle"):
        raise ConnectionError("redis://user:a-password@host")
    [span] = kept.get_finished_spans()
    assert not span.status.is_ok
    assert "ConnectionError" in span.to_json()
    assert "a-password" not in span.to_json()
