"""OpenTelemetry spans: a request, a script, a call of the PG. Attributes are names and numbers.

No token, no payment key and no text of a buyer is recorded. A caller's `traceparent` is not
trusted, since it would let strangers control sampling.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Thread
from typing import Final

from opentelemetry.context import Context
from opentelemetry.sdk.resources import (
    SERVICE_NAME,
    SERVICE_VERSION,
    OTELResourceDetector,
    Resource,
)
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    get_current_span,
    set_span_in_context,
    use_span,
)

from reservation import __version__

__all__ = ["Spans", "exporting"]

#: Time limit of the last export at shutdown; the supervisor waits for 4.5 s.
_LAST_EXPORT_SECONDS: Final = 1.0
#: Requests linked from a batch span: one page of any viewer, and the SDK's own limit.
_LINKS_MAX: Final = 128
_SERVER_ERROR: Final = 500


class Spans:
    """Creates the spans of this process."""

    def __init__(self, provider: TracerProvider, *, close: Callable[[], None]) -> None:
        self._close = close
        self._tracer = provider.get_tracer("reservation", __version__)

    def close(self) -> None:
        """Export the remaining spans."""
        self._close()

    def request(self, request_id: str) -> Span:
        """The span of a request: the first of its trace."""
        return self._tracer.start_span(
            "request",
            context=Context(),
            kind=SpanKind.SERVER,
            attributes={"reservation.request_id": request_id},
        )

    @contextmanager
    def inside(self, span: Span) -> Generator[None]:
        """Make the span current, so that spans started here are its children."""
        with use_span(span, record_exception=False, set_status_on_exception=False):
            yield

    def answered(self, span: Span, operation: str, status: int) -> None:
        """End the span of an answered request."""
        span.update_name(operation)
        span.set_attribute("http.response.status_code", status)
        if status >= _SERVER_ERROR:
            span.set_status(StatusCode.ERROR)
        span.end()

    def note(self, span: Span | None = None, **facts: str | int) -> None:
        """Set facts as attributes of a span, by default of the current one."""
        span = get_current_span() if span is None else span
        span.set_attributes({f"reservation.{fact}": value for fact, value in facts.items()})

    def here(self) -> SpanContext | None:
        """The current trace, if any."""
        found = get_current_span().get_span_context()
        return found if found.is_valid else None

    @contextmanager
    def root(self, name: str, **facts: str | int) -> Generator[None]:
        """Background work: the first span of its own trace."""
        with self._span(name, SpanKind.INTERNAL, Context(), facts):
            yield

    @contextmanager
    def step(self, name: str, **facts: str | int) -> Generator[Span | None]:
        """A call that leaves the process; no span outside a trace."""
        if self.here() is None:
            yield None
            return
        with self._span(name, SpanKind.CLIENT, None, facts) as span:
            yield span

    @contextmanager
    def batch(
        self, name: str, callers: Sequence[SpanContext | None], **facts: str | int
    ) -> Generator[None]:
        """Work for several requests at once: in the trace of the first, with links to the others.

        Args:
            name: of the work.
            callers: the trace of each request; None is one that is not traced.
            facts: recorded as attributes.
        """
        traced = [caller for caller in callers if caller is not None]
        if not traced:
            yield
            return
        # The first sampled one: a sampled buyer in an unsampled trace's batch would show nothing.
        parent = next((one for one in traced if one.trace_flags.sampled), traced[0])
        links = [Link(one) for one in traced if one is not parent][:_LINKS_MAX]
        context = set_span_in_context(NonRecordingSpan(parent), Context())
        with self._span(name, SpanKind.INTERNAL, context, facts, links):
            yield

    @contextmanager
    def _span(
        self,
        name: str,
        kind: SpanKind,
        context: Context | None,
        facts: dict[str, str | int],
        links: Sequence[Link] = (),
    ) -> Generator[Span]:
        attributes = {f"reservation.{fact}": value for fact, value in facts.items()}
        with self._tracer.start_as_current_span(
            name,
            context=context,
            kind=kind,
            attributes=attributes,
            links=links,
            # An error's text may contain an address with a password: its name is enough.
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(StatusCode.ERROR)
                raise


def exporting(role: str) -> Spans:
    """Spans exported to `OTEL_EXPORTER_OTLP_ENDPOINT`, sampled by `OTEL_TRACES_SAMPLER`."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - slow
        OTLPSpanExporter,
    )
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - likewise

    ours = Resource({SERVICE_NAME: f"reservation-{role}", SERVICE_VERSION: __version__})
    provider = TracerProvider(
        # `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` override our own names.
        resource=ours.merge(OTELResourceDetector().detect()),
        shutdown_on_exit=False,
    )
    # Its queue is bounded: spans that a slow collector does not take are dropped without waiting.
    sender = BatchSpanProcessor(OTLPSpanExporter())
    provider.add_span_processor(sender)
    return Spans(provider, close=partial(_within, _LAST_EXPORT_SECONDS, sender.shutdown))


def _within(seconds: float, last: Callable[[], None]) -> None:
    """Run the final export in a thread with a time limit, since the export itself has none."""
    sending = Thread(target=last, daemon=True)
    sending.start()
    sending.join(seconds)
