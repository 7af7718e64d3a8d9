"""Traces from a caller's span through the append to the projection's transaction, on a real MongoDB."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from pydantic import SecretStr

from appender.app import serve
from appender.settings import AppenderSettings
from eventstore import tracing
from eventstore.client import connect, open_database
from eventstore.settings import EventStoreSettings
from projector.declared import from_definition
from projector.metrics import Metrics
from projector.settings import ProjectorSettings
from projector.supervisor import Supervisor
from projector.wanted import FixedCatalog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from opentelemetry.sdk.trace import ReadableSpan

    from eventstore.client import Database

TRACE_ID, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE_ID}-{CALLER}-01"}

# The instrumentation derives from aiohttp's Application, which aiohttp discourages.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Inheritance class .* from web.Application is discouraged:DeprecationWarning"
)


@contextlib.asynccontextmanager
async def appender(mongodb_uri: str, database: Database) -> AsyncIterator[str]:
    """An appender; its address."""
    stopping, port = asyncio.Event(), asyncio.get_running_loop().create_future()
    store = EventStoreSettings(mongodb_uri=SecretStr(mongodb_uri), eventstore_database=database.name)
    task = asyncio.create_task(serve(AppenderSettings(port=0), store, stopping, started=port.set_result))
    try:
        yield f"http://127.0.0.1:{await port}"
    finally:
        stopping.set()
        await task


async def append(address: str, aggregate_id: str, names: list[str], headers: dict[str, str] | None = None) -> None:
    """Appends events, once the appender takes them."""
    body = {"events": [{"eventName": name, "payload": {"secret": "s3cret"}} for name in names]}
    async with aiohttp.ClientSession(headers=headers) as session, asyncio.timeout(10):
        while True:
            async with session.post(f"{address}/v1/aggregates/{aggregate_id}/events", json=body) as response:
                if response.status == 201:
                    return
                assert response.status == 503, await response.text()
                await asyncio.sleep(0.05)


@pytest.fixture
async def spans(mongodb_uri: str, database: Database) -> AsyncIterator[tuple[str, InMemorySpanExporter]]:
    """A traced appender, and what it exports."""
    exporter = InMemorySpanExporter()
    with tracing.tracing("test", SimpleSpanProcessor(exporter)):
        async with appender(mongodb_uri, database) as address:
            await append(address, "warm-up", ["Started"])
            exporter.clear()
            yield address, exporter


def only(spans: list[ReadableSpan], name: str) -> ReadableSpan:
    """The span of that name."""
    (found,) = [span for span in spans if span.name == name]
    return found


async def test_append_is_a_child_of_the_caller_and_its_events_name_it(
    spans: tuple[str, InMemorySpanExporter], database: Database
) -> None:
    address, exporter = spans
    await append(address, "order-1", ["Placed", "Paid"], HEADERS)
    found = list(exporter.get_finished_spans())
    request = only(found, "POST /v1/aggregates/{aggregateId}/events")
    append_span = only(found, "append")
    assert request.kind is SpanKind.SERVER
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == CALLER
    assert append_span.parent is not None
    assert append_span.parent.span_id == request.context.span_id
    expected = f"00-{TRACE_ID}-{append_span.context.span_id:016x}-01"
    events = await database["events"].find({"aggregateId": "order-1"}).to_list(10)
    assert [event["metadata"]["traceparent"] for event in events] == [expected, expected]


async def test_commit_is_linked_to_its_appends_and_above_the_drivers_commands(
    spans: tuple[str, InMemorySpanExporter], database: Database
) -> None:
    address, exporter = spans
    await append(address, "order-1", ["Placed"], HEADERS)
    found = list(exporter.get_finished_spans())
    commit = only(found, "commit")
    assert commit.parent is None
    assert [link.context.span_id for link in commit.links] == [only(found, "append").context.span_id]
    assert dict(commit.attributes or {}) == {"eventprojector.events": 1}
    commands = [span for span in found if span.kind is SpanKind.CLIENT]
    assert f"{database.name}.insert" in {span.name for span in commands}
    for command in commands:
        assert command.parent is not None, command.name
        assert command.parent.span_id == commit.context.span_id


async def test_spans_hold_neither_payloads_nor_probes(spans: tuple[str, InMemorySpanExporter]) -> None:
    address, exporter = spans
    await append(address, "order-1", ["Placed"], HEADERS)
    async with aiohttp.ClientSession() as session:
        for path in ("/healthz", "/readyz", "/metrics"):
            async with session.get(address + path) as response:
                assert response.status == 200
    found = list(exporter.get_finished_spans())
    assert {span.name for span in found if span.kind is SpanKind.SERVER} == {"POST /v1/aggregates/{aggregateId}/events"}
    assert all("s3cret" not in span.to_json() for span in found)


async def test_projection_is_linked_to_the_appends_of_its_events(
    spans: tuple[str, InMemorySpanExporter], mongodb_uri: str, database: Database
) -> None:
    """Also though its fold needs nothing of the metadata."""
    address, exporter = spans
    orders = from_definition({"name": "orders", "version": 1, "on": {"Placed": {"$inc": {"placed": 1}}}})
    stopping = asyncio.Event()
    async with connect(SecretStr(mongodb_uri), "projector") as client:
        traced = open_database(client, database.name)
        supervisor = Supervisor(traced, traced, FixedCatalog([orders]), ProjectorSettings(), Metrics())
        task = asyncio.create_task(supervisor.run(stopping))
        try:
            async with asyncio.timeout(30):
                while (await database["projector.status"].find_one({"_id": "orders"}) or {}).get("state") != "live":
                    await asyncio.sleep(0.05)
                exporter.clear()
                await append(address, "order-1", ["Placed"], HEADERS)
                while await database["orders"].find_one({"_id": "order-1"}) is None:
                    await asyncio.sleep(0.05)
        finally:
            stopping.set()
            await task
    found = list(exporter.get_finished_spans())
    written = [span for span in found if span.name == "project orders" and span.links]
    assert [[link.context.span_id for link in span.links] for span in written] == [
        [only(found, "append").context.span_id]
    ]
    assert dict(written[0].attributes or {}) == {"eventprojector.events": 1}
    below = {span.name for span in found if span.parent and span.parent.span_id == written[0].context.span_id}
    assert "admin.commitTransaction" in below


async def test_without_tracing_events_keep_what_the_caller_sent(mongodb_uri: str, database: Database) -> None:
    async with appender(mongodb_uri, database) as address:
        await append(address, "order-1", ["Placed"], HEADERS)
        await append(address, "order-2", ["Placed"])
    events: dict[str, Any] = {event["aggregateId"]: event async for event in database["events"].find()}
    assert events["order-1"]["metadata"] == HEADERS
    assert "metadata" not in events["order-2"]


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_the_environment_says_whether(
    environment: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        "OTEL_TRACES_EXPORTER",
        "OTEL_SDK_DISABLED",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with tracing.tracing("test"):
        assert tracing.enabled() is wanted
    assert not tracing.enabled()


def test_off_costs_nothing_that_grows() -> None:
    def handle(_request: Any) -> Any:
        raise NotImplementedError

    fields = frozenset({"payload.a"})
    links: dict[int, Any] = {}
    assert tracing.handler("append", handle) is handle
    assert tracing.fields(fields) is fields
    assert tracing.traceparent("received") == "received"
    assert tracing.current() is None
    tracing.collect([{"metadata": HEADERS}], links)
    assert links == {}


def test_links_are_an_even_sample_and_bounded() -> None:
    exporter = InMemorySpanExporter()
    events = [{"metadata": {"traceparent": f"00-{TRACE_ID}-{number:016x}-01"}} for number in range(1, 5_001)]
    events[3]["metadata"] = {"traceparent": "nonsense"}
    links: dict[int, Any] = {}
    with tracing.tracing("test", SimpleSpanProcessor(exporter)):
        tracing.collect(events, links)
        tracing.collect(events, links)
        with tracing.span("project permits", links.values(), events=5_000):
            pass
    assert len(links) == tracing.LINKS
    assert max(links) > 4_000
    (span,) = exporter.get_finished_spans()
    assert len(span.links) == tracing.LINKS
