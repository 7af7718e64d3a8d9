"""Traces, by OpenTelemetry (extra `tracing`): off unless the environment says where they go, and then free of cost.

They are on when `OTEL_EXPORTER_OTLP_ENDPOINT` (or `…_TRACES_ENDPOINT`) is set, or `OTEL_TRACES_EXPORTER=otlp`; all other
variables of OpenTelemetry hold as it documents them (service name, sampler, headers). What is traced:

    POST /v1/aggregates/…/events     the request (aiohttp), a child of the caller's span
    └── append                       its traceparent goes into the metadata of the events
    commit                           a batch of the appender: linked to its appends, above the driver's commands
    project NAME                     a transaction of a projection: linked to the appends of its events

One trace does not reach from append to projection, since a projection's transaction serves many appends: links do.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Final

import structlog

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

    from aiohttp import web
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import SpanContext

    from eventstore._opentelemetry import Tracer

__all__ = ["LINKS", "collect", "current", "enabled", "fields", "handler", "span", "traceparent", "tracing"]

LINKS: Final = 32
"""Links of a span. More would tell no more, and OpenTelemetry cuts them at 128."""

_TRACEPARENT: Final = "metadata.traceparent"

_log = structlog.stdlib.get_logger(__name__)
_tracer: Tracer | None = None


def _wanted() -> bool:
    ask = os.environ.get
    if (ask("OTEL_SDK_DISABLED") or "").lower() == "true" or ask("OTEL_TRACES_EXPORTER") == "none":
        return False
    return bool(
        ask("OTEL_EXPORTER_OTLP_ENDPOINT")
        or ask("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        or ask("OTEL_TRACES_EXPORTER") == "otlp"
    )


@contextlib.contextmanager
def tracing(component: str, processor: SpanProcessor | None = None) -> Iterator[None]:
    """Traces the process while the context lasts, if the environment wishes it or a `processor` of spans is given.

    Clients and applications that are made within it are instrumented. Without the extra a line in the log says so, and the
    process goes on without traces: they are not worth an outage.
    """
    global _tracer  # noqa: PLW0603 - a process has one tracer, and what asks for it is everywhere
    if _tracer is not None or not (processor or _wanted()):
        yield
        return
    try:
        from eventstore import _opentelemetry  # noqa: PLC0415 - an extra
    except ImportError as error:
        _log.warning("tracing_unavailable", reason=str(error))
        yield
        return
    _tracer = _opentelemetry.Tracer(component, processor)
    _log.info("tracing_started")
    try:
        yield
    finally:
        tracer, _tracer = _tracer, None
        tracer.close()


def enabled() -> bool:
    """Whether spans are recorded: what costs anything is done behind this question."""
    return _tracer is not None


def handler(
    name: str, handle: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The handler within a span of its own; the handler itself when nothing is traced."""
    tracer = _tracer
    if tracer is None:
        return handle

    async def traced(request: web.Request) -> web.StreamResponse:
        with tracer.producer(name):
            return await handle(request)

    return traced


def traceparent(received: str | None) -> str | None:
    """What an event keeps as `metadata.traceparent`: the span that is being recorded, else what the caller sent."""
    return received if _tracer is None else _tracer.traceparent() or received


def current() -> SpanContext | None:
    """The span that is being recorded, for a link to it later; None when nothing is traced."""
    return None if _tracer is None else _tracer.current()


def fields(wanted: Iterable[str] | None) -> Iterable[str] | None:
    """The event fields that a reader must ask for so that `collect` finds something; None stands for all."""
    return wanted if _tracer is None or wanted is None else {*wanted, _TRACEPARENT}


def collect(events: Sequence[Mapping[str, Any]], links: dict[int, SpanContext]) -> None:
    """Adds the spans that appended these events, by their ids, until there are LINKS: an even sample of a large batch."""
    if _tracer is None:
        return
    for event in events[:: max(1, len(events) // LINKS)]:
        if len(links) >= LINKS:
            return
        metadata = event.get("metadata")
        value = metadata.get("traceparent") if isinstance(metadata, dict) else None
        if isinstance(value, str) and (found := _tracer.parsed(value)) is not None:
            links[found.span_id] = found


@contextlib.contextmanager
def span(name: str, links: Iterable[SpanContext | None] = (), **attributes: str | int) -> Iterator[None]:
    """A span that begins a trace of its own, linked to at most LINKS others; nothing when nothing is traced."""
    tracer = _tracer
    if tracer is None:
        yield
        return
    found = list({link.span_id: link for link in links if link is not None}.values())[:LINKS]
    with tracer.consumer(name, found, {f"eventprojector.{key}": value for key, value in attributes.items()}):
        yield
