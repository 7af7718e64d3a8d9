"""What every route has around it: the token, the metrics, and problems as answers. Bodies are read here, within limits."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Final

import structlog
from aiohttp import web

from appender.problems import Internal, Problem, SlowRequest, TooLarge, Unauthorized, UnsupportedMediaType
from eventstore.problems import MEDIA_TYPE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from appender.metrics import Metrics
    from eventstore.auth import Tokens

__all__ = ["JSON", "NDJSON", "Endpoints", "json_response", "media_type", "read_body", "render"]

_log = structlog.get_logger(__name__)

JSON: Final = "application/json"
NDJSON: Final = "application/x-ndjson"


_JSON_HEADERS: Final = {"Content-Type": JSON}


class Endpoints:
    """Wraps handlers; counts what is in progress."""

    def __init__(self, metrics: Metrics, tokens: Tokens | None) -> None:
        self._metrics = metrics
        self._tokens = tokens
        self._in_progress = 0
        metrics.follow(metrics.in_progress, lambda: self._in_progress)

    def wrap(
        self, route: str, method: str, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """The handler with token check, metrics by the route's template, and problems turned into answers."""
        seconds = self._metrics.request_seconds.labels(route, method)
        requests = self._metrics.requests
        # From 0 on: a counter that begins with the first failures would hide them from rate() and from the alerts.
        codes: dict[int, Any] = {status: requests.labels(route, method, str(status)) for status in (500, 503)}

        tokens = self._tokens

        # One coroutine, not layers of them: it is on the path of every append.
        async def handle(request: web.Request) -> web.StreamResponse:
            started = time.perf_counter()
            self._in_progress += 1
            response: web.StreamResponse
            try:
                if tokens is None or tokens.accept(request.headers.get("Authorization")):
                    response = await handler(request)
                else:
                    response = render(Unauthorized("Send the header 'Authorization: Bearer <token>'."))
            except Problem as problem:
                response = render(problem)
            except web.HTTPRequestEntityTooLarge:
                response = render(TooLarge("The request body is over the limit."))
            except ConnectionError:
                raise  # the client went away; there is nobody to answer
            except Exception as error:  # noqa: BLE001 - the last line of defence: the service goes on
                _log.error("request_failed", exc_info=error)
                response = render(Internal("The request could not be carried out; its outcome may be unknown."))
            finally:
                self._in_progress -= 1
            status = response.status
            counter = codes.get(status)
            if counter is None:
                counter = codes[status] = requests.labels(route, method, str(status))
            counter.inc()
            seconds.observe(time.perf_counter() - started)
            return response

        return handle


def render(problem: Problem) -> web.Response:
    """A problem as an answer."""
    return web.Response(
        body=problem.encode(), status=problem.status, headers={"Content-Type": MEDIA_TYPE, **problem.headers}
    )


def json_response(body: bytes, status: int = 200) -> web.Response:
    """Encoded JSON as an answer."""
    return web.Response(body=body, status=status, headers=_JSON_HEADERS)


def media_type(request: web.Request) -> str:
    """The Content-Type without parameters, in lower case."""
    header = request.headers.get("Content-Type", "")
    return header if header == JSON else header.partition(";")[0].strip().lower()


def require_json(request: web.Request) -> None:
    """Raises UnsupportedMediaType unless the body is JSON."""
    if (found := media_type(request)) != JSON:
        raise UnsupportedMediaType(f"Send {JSON}, not {found or 'a body without Content-Type'}.")


async def read_body(request: web.Request, limit: int, seconds: float) -> bytes:
    """The whole body. Raises TooLarge, and SlowRequest when it does not arrive in time."""
    length = request.content_length
    if length is not None and length > limit:
        raise TooLarge(f"The request body has {length} bytes; it may have {limit}.")
    if request.content.is_eof():  # arrived with its headers, as nearly all do: no timer
        return await request.read()
    try:
        async with asyncio.timeout(seconds):
            return await request.read()
    except TimeoutError as error:
        raise SlowRequest(f"The body did not arrive within {seconds:g} s.") from error
