"""The routes of the API: what comes in is decoded, encoded, queued; what comes back is told."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, unquote

import msgspec
from aiohttp import web

from appender import bulk, cloudevents, history
from appender.encoding import MAX_LEVELS, check_aggregate_id, check_distinct, encode_append
from appender.endpoint import JSON, NDJSON, json_response, media_type, read_body, require_json
from appender.problems import Invalid, MethodNotAllowed, NotFound, TooLarge, UnsupportedMediaType
from appender.requests import (
    MAX_REQUEST_EVENTS,
    AggregateHead,
    Appended,
    AppendedEvent,
    AppendedSeveral,
    AppendRequest,
    SeveralRequest,
    decode,
)
from eventstore import log, tracing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from typing import TypeAlias

    from appender.committer import Committer
    from appender.encoding import Append
    from appender.endpoint import Endpoints
    from appender.requests import NewAppend
    from appender.settings import AppenderSettings
    from eventstore.client import Database

    _Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]

__all__ = ["EVENTS_PATH", "HEAD_PATH", "HISTORY_PATH", "Routes"]

HISTORY_PATH: Final = "/v1/aggregates/{aggregateId}/events"
HEAD_PATH: Final = "/v1/aggregates/{aggregateId}"
EVENTS_PATH: Final = "/v1/events"

_append: Final = msgspec.json.Decoder(AppendRequest)
_several: Final = msgspec.json.Decoder(SeveralRequest)
_encoder: Final = msgspec.json.Encoder()
_WRITE_BYTES: Final = 64 * 1024


class Routes:
    """The handlers, with what they need."""

    def __init__(self, committer: Committer, database: Database, settings: AppenderSettings) -> None:
        self._committer = committer
        self._database = database
        self._settings = settings

    def add_to(self, app: web.Application, endpoints: Endpoints, openapi: bytes) -> None:
        """Adds the API's routes, and problems for all others."""

        async def document(_request: web.Request) -> web.Response:
            return json_response(openapi)

        handlers: dict[str, dict[str, _Handler]] = {
            HISTORY_PATH: {"POST": self.append, "GET": self.history},
            HEAD_PATH: {"GET": self.head},
            EVENTS_PATH: {"POST": self.append_several},
            "/openapi.json": {"GET": document},
        }
        for path, methods in handlers.items():
            # An aggregateId may hold anything, percent-encoded; braces and line breaks too.
            resource = app.router.add_resource(path.replace("{aggregateId}", "{aggregateId:[^/]+}"))
            for method, handle in methods.items():
                handler = tracing.handler("append", handle) if method == "POST" else handle
                resource.add_route(method, endpoints.wrap(path, method, handler))
            allowed = ", ".join(methods)
            resource.add_route("*", endpoints.wrap(path, "other", _not_allowed(allowed)))
        for path in ("/healthz", "/readyz", "/metrics"):
            app.router.add_route("*", path, endpoints.wrap(path, "other", _not_allowed("GET, HEAD")))
        app.router.add_route("*", "/{path:.*}", endpoints.wrap("unmatched", "other", _not_found))

    async def append(self, request: web.Request) -> web.Response:
        """POST of events for one aggregate."""
        require_json(request)
        body = await self._body(request)
        wanted: AppendRequest = decode(_append, body)
        append = encode_append(
            _aggregate_id(request),
            wanted.expected_sequence_no,
            wanted.events,
            self._settings.max_event_bytes,
            traceparent=tracing.traceparent(request.headers.get("traceparent")),
            deep=_maybe_deep(body),
        )
        if len(wanted.events) > 1:
            check_distinct((append,))
        done = await self._committer.append((append,))
        return json_response(_encoder.encode(_appended(append)), 200 if done.replayed and not done.uncertain else 201)

    async def append_several(self, request: web.Request) -> web.StreamResponse:
        """POST of events for several aggregates, of a stream of lines, or of CloudEvents."""
        kind = media_type(request)
        if kind == NDJSON:
            traceparent = tracing.traceparent(request.headers.get("traceparent"))
            return await bulk.stream(request, self._committer, self._settings, traceparent)
        if cloudevents.is_binary(request.headers):
            require_json(request)
            body = await self._body(request)
            return await self._append_all(request, [cloudevents.binary(request.headers, body)], body, one=True)
        if kind == JSON:
            body = await self._body(request)
            wanted: SeveralRequest = decode(_several, body)
            return await self._append_all(request, wanted.appends, body)
        if kind == cloudevents.STRUCTURED:
            body = await self._body(request)
            return await self._append_all(request, [cloudevents.structured(body)], body, one=True)
        if kind == cloudevents.BATCH:
            body = await self._body(request)
            return await self._append_all(request, cloudevents.batch(body), body)
        raise UnsupportedMediaType(
            f"Send {JSON}, {NDJSON}, {cloudevents.STRUCTURED} or {cloudevents.BATCH}, not"
            f" {kind or 'a body without Content-Type'}."
        )

    async def _append_all(
        self, request: web.Request, wanted: Sequence[NewAppend], body: bytes, *, one: bool = False
    ) -> web.Response:
        total = sum(len(each.events) for each in wanted)
        if total > MAX_REQUEST_EVENTS:
            raise TooLarge(
                f"The request has {total} events; an atomic append may have {MAX_REQUEST_EVENTS} (send a stream of lines)."
            )
        aggregates = {each.aggregate_id for each in wanted}
        if len(aggregates) < len(wanted):
            raise Invalid("appends", "names an aggregateId twice; put all its events into one entry")
        traceparent = tracing.traceparent(request.headers.get("traceparent"))
        deep = _maybe_deep(body)
        appends = [
            encode_append(
                each.aggregate_id,
                each.expected_sequence_no,
                each.events,
                self._settings.max_event_bytes,
                field="" if one else f"appends[{index}].",
                traceparent=traceparent,
                deep=deep,
            )
            for index, each in enumerate(wanted)
        ]
        check_distinct(appends)
        done = await self._committer.append(appends)
        answer: Any = _appended(appends[0]) if one else AppendedSeveral([_appended(append) for append in appends])
        return json_response(_encoder.encode(answer), 200 if done.replayed and not done.uncertain else 201)

    async def history(self, request: web.Request) -> web.StreamResponse:
        """GET of an aggregate's events: a page, or all of them as a stream of lines."""
        aggregate_id = _aggregate_id(request)
        check_aggregate_id(aggregate_id)
        after = _number(request, "after", 0, 0, (1 << 63) - 1)
        if NDJSON in request.headers.get("Accept", ""):
            limit = _number(request, "limit", 0, 1, (1 << 31) - 1)
            return await self._stream_history(request, aggregate_id, after, limit)
        limit = _number(request, "limit", 100, 1, history.MAX_PAGE_EVENTS)
        events: list[msgspec.Raw] = []
        size, last, more = 0, after, False
        async for sequence_no, encoded in history.read(self._database, aggregate_id, after=after, limit=limit):
            if events and size + len(encoded) > history.PAGE_BYTES:
                more = True
                break
            events.append(msgspec.Raw(encoded))
            size += len(encoded)
            last = sequence_no
        page: dict[str, Any] = {"aggregateId": aggregate_id, "events": events}
        if more or len(events) == limit:
            path = HISTORY_PATH.replace("{aggregateId}", quote(aggregate_id, safe=""))
            page["next"] = f"{path}?after={last}&limit={limit}"
        return json_response(_encoder.encode(page))

    async def _stream_history(
        self, request: web.Request, aggregate_id: str, after: int, limit: int
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": NDJSON})
        await response.prepare(request)
        try:
            await _write_lines(
                response,
                history.read(self._database, aggregate_id, after=after, limit=limit),
                self._settings.read_timeout_seconds,
            )
            await response.write_eof()
        except BaseException:
            if request.transport is not None:
                request.transport.abort()  # a cut stream must not look like a complete one
            raise
        return response

    async def head(self, request: web.Request) -> web.Response:
        """GET of an aggregate's last sequenceNo."""
        aggregate_id = _aggregate_id(request)
        check_aggregate_id(aggregate_id)
        sequence_no = await log.head(self._database, aggregate_id)
        if sequence_no == 0:
            raise NotFound(f"No event of {aggregate_id!r} was appended.")
        tag = f'"{sequence_no}"'
        asked = request.headers.get("If-None-Match", "")
        if asked == "*" or tag in (each.strip().removeprefix("W/") for each in asked.split(",")):
            return web.Response(status=304, headers={"ETag": tag})
        response = json_response(_encoder.encode(AggregateHead(aggregate_id, sequence_no)))
        response.headers["ETag"] = tag
        return response

    def _body(self, request: web.Request) -> Awaitable[bytes]:
        return read_body(request, self._settings.max_request_bytes, self._settings.read_timeout_seconds)


async def _write_lines(response: web.StreamResponse, events: AsyncIterator[tuple[int, bytes]], seconds: float) -> None:
    """Writes events as lines, some at once; raises TimeoutError when the client takes none for so long."""
    lines: list[bytes] = []
    size = 0
    async for _, encoded in events:
        lines.append(encoded)
        size += len(encoded)
        if size > _WRITE_BYTES:
            async with asyncio.timeout(seconds):
                await response.write(b"\n".join((*lines, b"")))
            lines, size = [], 0
    if lines:
        async with asyncio.timeout(seconds):
            await response.write(b"\n".join((*lines, b"")))


def _not_allowed(allowed: str) -> _Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        raise MethodNotAllowed(f"{request.method} is not allowed here.", allowed)

    return handler


async def _not_found(request: web.Request) -> web.StreamResponse:
    raise NotFound(f"There is no {request.path}.")


def _aggregate_id(request: web.Request) -> str:
    found = request.match_info["aggregateId"]
    raw = request.rel_url.raw_path
    if "%" not in raw:
        return found
    try:
        return unquote(raw.split("/")[3], errors="strict")
    except UnicodeDecodeError as error:
        raise Invalid("aggregateId", "must be percent-encoded UTF-8") from error


def _appended(append: Append) -> Appended:
    numbers = append.sequence_nos
    events = [AppendedEvent(event.event_id, number) for event, number in zip(append.events, numbers, strict=True)]
    return Appended(append.aggregate_id, numbers[0], numbers[-1], events)


def _maybe_deep(body: bytes) -> bool:
    """Whether the body may be nested beyond the limit: cheap, and False for nearly all."""
    return body.count(b"{") + body.count(b"[") > MAX_LEVELS


def _number(request: web.Request, name: str, default: int, least: int, most: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20 and least <= int(text) <= most):
        raise Invalid(name, f"must be a whole number from {least} to {most}")
    return int(text)
