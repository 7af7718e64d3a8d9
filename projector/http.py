"""The ops API of a running projector: the verbs of `projector.ops` over HTTP, beside probes and metrics.

Everybody who reaches the port may look. Orders (everything but GET) need a bearer token as soon as others than this machine can
reach it; without a token file they are refused there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec
import structlog
from aiohttp import web
from pymongo.errors import PyMongoError

from eventstore.auth import Tokens
from eventstore.problems import MEDIA_TYPE
from eventstore.service import add_ops_routes
from projector.ops import PAGE, Ops
from projector.refusals import (
    Forbidden,
    Internal,
    Invalid,
    MethodNotAllowed,
    NotFound,
    NotReached,
    Problem,
    Unauthorized,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from prometheus_client import CollectorRegistry

    from eventstore.service import Liveness, Readiness
    from projector.settings import ProjectorSettings
    from projector.supervisor import Supervisor

__all__ = ["is_loopback", "make_app", "serve"]

MAX_BODY_BYTES: Final = 64 * 1024
"""An aggregateId and a number: the largest body is far below."""

MAX_WAITS: Final = 256
"""Waits at once: each is some small reads a second, together less than a projection's own work. More are answered with 503."""

_Body = TypeVar("_Body", bound=msgspec.Struct)
_Number = TypeVar("_Number", int, float)
_log = structlog.stdlib.get_logger(__name__)


class _Partitions(msgspec.Struct, forbid_unknown_fields=True):
    partitions: int


class _Retry(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    aggregate_id: str | None = None


class _Skip(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    aggregate_id: str
    sequence_no: int


class _Verify(msgspec.Struct, forbid_unknown_fields=True):
    sample: int | None = None


@contextlib.asynccontextmanager
async def serve(
    supervisor: Supervisor, registry: CollectorRegistry, not_ready: Readiness, stuck: Liveness
) -> AsyncIterator[int]:
    """Serves on the address of the settings while the context lasts; yields the port.

    Raises OSError when it is taken, `eventstore.auth.TokensMissingError` for a token file without a token.
    """
    ops = Ops(supervisor.log, supervisor.database, lambda: supervisor.projections)
    app = make_app(ops, supervisor.settings)
    add_ops_routes(app, registry, not_ready, stuck)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        site = web.TCPSite(runner, supervisor.settings.http_host, supervisor.settings.http_port)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


def make_app(ops: Ops, settings: ProjectorSettings) -> web.Application:
    """The application with the verbs alone. Raises `eventstore.auth.TokensMissingError`."""
    tokens = Tokens(settings.token_file) if settings.token_file is not None else None
    guard = _Guard(tokens, open_to_all=tokens is None and is_loopback(settings.http_host))
    app = web.Application(middlewares=[guard.middleware], client_max_size=MAX_BODY_BYTES)
    _Routes(ops).add_to(app)
    return app


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine (this pod) alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Guard:
    """Asks for the token, and turns what was raised into answers."""

    def __init__(self, tokens: Tokens | None, *, open_to_all: bool) -> None:
        self._tokens = tokens
        self._open_to_all = open_to_all

    @web.middleware
    async def middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Around every handler."""
        try:
            self._check(request)
            return await handler(request)
        except ConnectionError:
            raise  # the client went away; there is nobody to answer
        except Exception as error:  # noqa: BLE001 - the last line of defence: the projector goes on
            problem = _problem(error)
        return web.Response(
            body=problem.encode(), status=problem.status, headers={"Content-Type": MEDIA_TYPE, **problem.headers}
        )

    def _check(self, request: web.Request) -> None:
        if request.method in {"GET", "HEAD"} or self._open_to_all:
            return
        if self._tokens is None:
            raise Forbidden(
                "The projector listens beyond this machine and has no token file, so it takes no orders over HTTP. Set "
                "PROJECTOR_TOKEN_FILE to a file with a bearer token, or use the command `projector` in its pod."
            )
        if not self._tokens.accept(request.headers.get("Authorization")):
            raise Unauthorized("Send the header 'Authorization: Bearer <token>'.")


class _Routes:
    """The handlers."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self._waits = asyncio.Semaphore(MAX_WAITS)
        self._verifying = asyncio.Lock()

    def add_to(self, app: web.Application) -> None:
        """Adds them to an application."""
        one = "/v1/projections/{name}"
        app.add_routes(
            [
                web.get("/v1/projections", self._list),
                web.get(one, self._show),
                web.delete(one, self._drop),
                web.post(f"{one}/pause", self._pause),
                web.post(f"{one}/resume", self._resume),
                web.put(f"{one}/partitions", self._partitions),
                web.post(f"{one}/rebuild", self._rebuild),
                web.post(f"{one}/cutover", self._cutover),
                web.post(f"{one}/rollback", self._rollback),
                web.post(f"{one}/cancel", self._cancel),
                web.get(f"{one}/parked", self._parked),
                web.post(f"{one}/parked/retry", self._retry),
                web.post(f"{one}/parked/skip", self._skip),
                web.get(f"{one}/wait", self._wait),
                web.post(f"{one}/verify", self._verify),
            ]
        )

    async def _list(self, _request: web.Request) -> web.Response:
        return _answer({"projections": await self._ops.projections()})

    async def _show(self, request: web.Request) -> web.Response:
        return _answer(await self._ops.show(_name(request)))

    async def _drop(self, request: web.Request) -> web.Response:
        await self._ops.drop(_name(request))
        return web.Response(status=204)

    async def _pause(self, request: web.Request) -> web.Response:
        return _answer(await self._ops.pause(_name(request)))

    async def _resume(self, request: web.Request) -> web.Response:
        return _answer(await self._ops.resume(_name(request)))

    async def _partitions(self, request: web.Request) -> web.Response:
        body = await _read(request, _Partitions)
        return _answer(await self._ops.partitions(_name(request), body.partitions))

    async def _rebuild(self, request: web.Request) -> web.Response:
        return _answer({"build": await self._ops.rebuild(_name(request))}, status=202)

    async def _cutover(self, request: web.Request) -> web.Response:
        return _answer({"build": await self._ops.cutover(_name(request))}, status=202)

    async def _rollback(self, request: web.Request) -> web.Response:
        return _answer({"build": await self._ops.rollback(_name(request))}, status=202)

    async def _cancel(self, request: web.Request) -> web.Response:
        return _answer({"build": await self._ops.cancel(_name(request))})

    async def _parked(self, request: web.Request) -> web.Response:
        limit = _query(request, "limit", int, PAGE)
        return _answer(await self._ops.parked(_name(request), after=request.query.get("after", ""), limit=limit))

    async def _retry(self, request: web.Request) -> web.Response:
        body = await _read(request, _Retry)
        return _answer({"retried": await self._ops.retry(_name(request), body.aggregate_id)}, status=202)

    async def _skip(self, request: web.Request) -> web.Response:
        body = await _read(request, _Skip)
        await self._ops.skip(_name(request), body.aggregate_id, body.sequence_no)
        return _answer({"skipped": body.sequence_no}, status=202)

    async def _wait(self, request: web.Request) -> web.Response:
        aggregate_id = request.query.get("aggregateId", "")
        if not aggregate_id:
            raise Invalid("aggregateId", "is missing")
        sequence_no = _query(request, "sequenceNo", int)
        timeout = _query(request, "timeout", float, 10.0)
        if self._waits.locked():
            raise Unavailable(f"{MAX_WAITS} requests are waiting already")
        async with self._waits:
            waited = await self._ops.wait(_name(request), aggregate_id, sequence_no, timeout)
        if not waited.reached:
            text = f"{aggregate_id} is at {waited.mark}, not yet at {sequence_no}"
            raise NotReached(f"{text}: {waited.reason}" if waited.reason else text, **msgspec.to_builtins(waited))
        return _answer(waited)

    async def _verify(self, request: web.Request) -> web.Response:
        body = await _read(request, _Verify)
        if body.sample is not None and body.sample < 1:
            raise Invalid("sample", "must be at least 1")
        if self._verifying.locked():
            raise Unavailable("a verification is running already")
        async with self._verifying:
            return _answer(await self._ops.verify(_name(request), body.sample))


def _problem(error: Exception) -> Problem:
    """What the caller is told of an error."""
    match error:
        case Problem():
            return error
        case web.HTTPNotFound():
            return NotFound("There is no such route.")
        case web.HTTPMethodNotAllowed():
            return MethodNotAllowed(f"{error.method} is not allowed here.", sorted(error.allowed_methods))
        case web.HTTPRequestEntityTooLarge():
            return Invalid("", f"the body has more than {MAX_BODY_BYTES} bytes")
        case PyMongoError():
            return Unavailable(f"MongoDB does not answer: {type(error).__name__}")
    _log.error("request_failed", exc_info=error)
    return Internal("The request could not be carried out; the log has the reason.")


def _answer(value: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value, enc_hook=str), status=status, content_type="application/json", charset="utf-8"
    )


def _name(request: web.Request) -> str:
    return request.match_info["name"]


def _query(request: web.Request, field: str, kind: type[_Number], default: _Number | None = None) -> _Number:
    """A number of the query. Raises Invalid."""
    given = request.query.get(field)
    if given is None:
        if default is None:
            raise Invalid(field, "is missing")
        return default
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError:
        raise Invalid(
            field, f"must be a number{' without a fraction' if kind is int else ''}, not {given!r:.40}"
        ) from None


async def _read(request: web.Request, kind: type[_Body]) -> _Body:
    """The body; none at all is an empty one. Raises Invalid."""
    raw = await request.read()
    try:
        return msgspec.json.decode(raw or b"{}", type=kind)
    except msgspec.MsgspecError as error:
        raise Invalid("", f"the body does not fit: {error}") from None
