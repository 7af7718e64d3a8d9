"""OpenTelemetry behind `eventstore.tracing`, which alone imports this, and only where the extra `tracing` is installed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.aiohttp_server import AioHttpServerInstrumentor
from opentelemetry.instrumentation.pymongo import CommandTracer
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanContext, SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from pymongo import monitoring

from eventstore import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

__all__ = ["Tracer"]

_EXCLUDED: Final = "/healthz,/readyz,/metrics"


class Tracer:
    """The tracer of a process, with pymongo's clients and aiohttp's applications instrumented until it is closed."""

    def __init__(self, component: str, processor: SpanProcessor | None) -> None:
        name = os.environ.get("OTEL_SERVICE_NAME") or f"eventprojector-{component}"
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
        self._provider.sampler = _WithoutOrphans(self._provider.sampler)
        self._provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("eventprojector", __version__)
        self._propagator = TraceContextTextMapPropagator()
        os.environ.setdefault("OTEL_PYTHON_AIOHTTP_SERVER_EXCLUDED_URLS", _EXCLUDED)
        self._server = AioHttpServerInstrumentor()
        self._server.instrument(tracer_provider=self._provider)
        # Not by its instrumentor, which keeps the first provider for as long as the process lives.
        self._driver = CommandTracer(self._tracer)
        monitoring.register(self._driver)

    def close(self) -> None:
        """Sends what waits (the exporter bounds for how long), and lets go of the libraries."""
        self._driver.is_enabled = False  # pymongo has no way to take a listener away
        self._server.uninstrument()
        self._provider.shutdown()

    def producer(self, name: str) -> AbstractContextManager[Any]:
        """A span below the current one."""
        return self._tracer.start_as_current_span(name, kind=SpanKind.PRODUCER, record_exception=False)

    def consumer(
        self, name: str, links: Iterable[SpanContext], attributes: dict[str, str | int]
    ) -> AbstractContextManager[Any]:
        """A span that begins a trace and is linked to others."""
        return self._tracer.start_as_current_span(
            name,
            context=Context(),
            kind=SpanKind.CONSUMER,
            links=[Link(link) for link in links],
            attributes=attributes,
        )

    def current(self) -> SpanContext | None:
        """The context of the current span, if there is one."""
        found = trace.get_current_span().get_span_context()
        return found if found.is_valid else None

    def traceparent(self) -> str | None:
        """The current span as W3C's header."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return carrier.get("traceparent")

    def parsed(self, traceparent: str) -> SpanContext | None:
        """The span that a header names; None when it names none."""
        context = self._propagator.extract({"traceparent": traceparent}, Context())
        found = trace.get_current_span(context).get_span_context()
        return found if found.is_valid else None


class _WithoutOrphans(Sampler):
    """Leaves out commands of the driver that serve nobody's span: polls, leases and pings would bury all else."""

    def __init__(self, inner: Sampler) -> None:
        self._inner = inner

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        *more: Any,
        **named: Any,
    ) -> SamplingResult:
        """Drops a client's span without a parent; else as the inner sampler says."""
        if kind is SpanKind.CLIENT and not trace.get_current_span(parent_context).get_span_context().is_valid:
            return SamplingResult(Decision.DROP)
        return self._inner.should_sample(parent_context, trace_id, name, kind, *more, **named)

    def get_description(self) -> str:
        """For people."""
        return f"WithoutOrphans{{{self._inner.get_description()}}}"
