"""Streams of lines: events come in, answers go out, in order, while both go on.

Each line is an append of its own. Lines of one aggregate are appended in their order; a line that fails does not stop the
next (give `expectedSequenceNo` where that matters). The stream is read no faster than its events are written and its
answers are taken.
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Final

import msgspec
from aiohttp import web

from appender.encoding import MAX_LEVELS, Append, check_aggregate_id, encode_event, whole
from appender.endpoint import NDJSON
from appender.problems import Problem, TooLarge
from appender.requests import AppendedLine, EventLine, decode

if TYPE_CHECKING:
    from aiohttp import StreamReader

    from appender.committer import Committer
    from appender.lanes import Request
    from appender.settings import AppenderSettings

__all__ = ["stream"]

GROUP_LINES: Final = 500
"""Lines answered together: enough to fill a batch, few enough that the loop is not blocked for more than some ms."""

GROUPS_AHEAD: Final = 4
"""Groups that wait for their answers while the next is read: with the batches in flight they keep MongoDB busy."""

_line: Final = msgspec.json.Decoder(EventLine)
_encoder: Final = msgspec.json.Encoder()


class _Group:
    """Some lines in a row and what became of them."""

    __slots__ = ("_answers", "_left", "complete")

    def __init__(self, lines: int) -> None:
        self._answers: list[Request | bytes | None] = [None] * lines
        self._left = lines
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def answer(self, index: int, answer: Request | bytes) -> None:
        """Sets the answer to a line."""
        self._answers[index] = answer
        self._left -= 1
        if self._left == 0 and not self.complete.done():
            self.complete.set_result(None)

    def encode(self) -> bytes:
        """All answers, a line each."""
        return b"".join(_encode(answer) for answer in self._answers if answer is not None)


def _encode(answer: Request | bytes) -> bytes:
    if isinstance(answer, bytes):
        return answer
    append = answer.appends[0]
    event_id = append.events[0].event_id
    if answer.problem is not None:
        return _problem(answer.problem, event_id)
    status = 200 if answer.replayed and not answer.uncertain else 201
    return _encoder.encode(AppendedLine(status, append.aggregate_id, event_id, append.sequence_nos[0])) + b"\n"


def _problem(problem: Problem, event_id: str | None = None) -> bytes:
    return msgspec.json.encode(problem.document() | ({"eventId": event_id} if event_id else {})) + b"\n"


async def stream(
    request: web.Request, committer: Committer, settings: AppenderSettings, traceparent: str | None
) -> web.StreamResponse:
    """Answers a stream of lines with a stream of lines."""
    response = web.StreamResponse(headers={"Content-Type": NDJSON})
    await response.prepare(request)
    lines = _Lines(request.content, committer, settings, traceparent)
    reader = asyncio.create_task(lines.read())
    try:
        while (group := await _next(lines.groups, reader)) is not None:
            await group.complete
            async with asyncio.timeout(settings.read_timeout_seconds):
                await response.write(group.encode())
        await response.write_eof()
    except TimeoutError:
        # The client takes no answers, or sends nothing: the stream is cut, so that it does not look complete.
        if request.transport is not None:
            request.transport.abort()
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
    return response


async def _next(groups: asyncio.Queue[_Group | None], reader: asyncio.Task[None]) -> _Group | None:
    """The next group; raises what ended the reader, if it ended without a last word."""
    getting = asyncio.ensure_future(groups.get())
    try:
        await asyncio.wait((getting, reader), return_when=asyncio.FIRST_COMPLETED)
        if not getting.done() and (error := reader.exception()) is not None:
            raise error
        return await getting
    finally:
        getting.cancel()


class _Lines:
    """The reading half of a stream: lines become events in the queue, and groups whose answers are awaited."""

    def __init__(
        self, content: StreamReader, committer: Committer, settings: AppenderSettings, traceparent: str | None
    ) -> None:
        self._content = content
        self._committer = committer
        self._limit = settings.max_event_bytes
        self._longest = 2 * settings.max_event_bytes  # an event's JSON may be longer than its BSON
        self._silence = settings.read_timeout_seconds
        self._traceparent = traceparent
        self.groups: asyncio.Queue[_Group | None] = asyncio.Queue(GROUPS_AHEAD)

    async def read(self) -> None:
        """Reads until the body ends or the appender shuts down; then the last group is None."""
        tail = b""
        skipping = ended = False
        while not ended and not self._committer.draining:
            async with asyncio.timeout(self._silence):
                chunk = await self._content.readany()
            ended = not chunk
            lines = (tail + chunk).split(b"\n")
            tail = b"" if ended else lines.pop()
            if skipping and lines:
                skipping = False
                lines[0] = b""  # the rest of a line that was answered already
            if len(tail) > self._longest:
                if not skipping:
                    skipping = True
                    lines.append(tail)
                tail = b""
            present = [line for line in lines if line and not line.isspace()]
            for start in range(0, len(present), GROUP_LINES):
                await self._queue(present[start : start + GROUP_LINES])
        await self.groups.put(None)

    async def _queue(self, lines: list[bytes]) -> None:
        group = _Group(len(lines))
        for index, line in enumerate(lines):
            event_id = None
            try:
                new = self._decode(line)
                event_id = new.event_id
                deep = line.count(b"{") + line.count(b"[") > MAX_LEVELS
                event = encode_event(new, self._limit, "", self._traceparent, deep)
                if self._committer.full:
                    await self._committer.room()
                expected = new.expected_sequence_no
                append = Append(new.aggregate_id, None if expected is None else whole(expected), (event,))
                self._committer.submit((append,), functools.partial(group.answer, index))
            except Problem as problem:
                group.answer(index, _problem(problem, event_id))
        await self.groups.put(group)

    def _decode(self, line: bytes) -> EventLine:
        if len(line) > self._longest:
            raise TooLarge(f"The line is longer than {self._longest} bytes.")
        new: EventLine = decode(_line, line)
        check_aggregate_id(new.aggregate_id)
        return new
