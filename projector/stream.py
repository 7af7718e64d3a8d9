"""Reading the log's change stream, a batch at a time.

pymongo's own `watch()` hands out one event per await and keeps the post-batch token to itself while a batch lasts; here
a batch arrives whole, with the token after it, and the server sends only the fields that the folds use.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pymongo
from bson.int64 import Int64
from bson.timestamp import Timestamp
from pymongo.errors import OperationFailure, PyMongoError

from eventstore.client import CODEC
from eventstore.errors import Meaning, classify
from eventstore.event import EVENTS, SLOTS
from projector.paths import minimal
from projector.position import Position

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pymongo.asynchronous.client_session import AsyncClientSession

    from eventstore.client import Database
    from projector.projection import Event

__all__ = ["ALL_SLOTS", "Batch", "EventStream", "PositionLostError", "event_fields", "position_now"]

ALL_SLOTS: Final = range(SLOTS)

BATCH_EVENTS: Final = 5_000
"""Events asked for at once. Measured: the write of a batch costs a fixed 2 to 3 ms, which 5,000 events make small; more only
adds memory and latency."""

WAIT_MS: Final = 1_000
"""How long the server waits for an event before it answers with an empty batch, which tells that there is none and moves the
position. Events do not wait for it; seldom enough to cost nothing, often enough to see within a second that all is read."""

MAJORITY_SECONDS: Final = 20.0
"""How long to wait for a majority before giving up: below the 30 s after which a socket is given up on."""

_WALL_TIME: Final = "wallTimeMilliseconds"
_ALWAYS: Final = ("aggregateId", "sequenceNo", "eventName", "slot")


class PositionLostError(Exception):
    """The stream cannot be resumed from this position, now or later: the events since must be read from the log."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the change stream cannot resume here: {reason}")
        self.reason = reason


@dataclass(slots=True)
class Batch:
    """Events in stream order, and the position after them."""

    events: list[Event]
    position: Position
    last_event_time: float | None = None
    """Commit time of the last event, seconds since the epoch by the server's clock; None where that is not known."""
    drained: bool = False
    """The position is that of the log's end, or less than a second before it. The number of events does not tell: a batch of
    large ones ends at 16 MiB."""
    seconds: float = 0.0
    """How much of the log's time it covers."""
    light: bool = False
    """The events carry no payload, since a change event was over 16 MiB: they must be read from the log."""


def event_fields(wanted: Iterable[str] | None) -> dict[str, Any]:
    """The `$project` stage that leaves the wanted fields of the event in a change event (None: all).

    An inclusion, not computed fields: what is left has the form in which the log holds it, also through arrays, so that a fold
    gets the same event from the stream and from the log. The change event's `_id` is its resume token, and must stay.
    """
    # The time as a number: a date costs three times as much to decode.
    stage: dict[str, Any] = {_WALL_TIME: {"$toLong": "$wallTime"}}
    if wanted is None:
        return stage | {"fullDocument": 1}
    paths = minimal(tuple(path.split(".")) for path in ("_id", *_ALWAYS, *wanted))
    return stage | {f"fullDocument.{path}": 1 for path in paths}


async def position_now(database: Database) -> Position:
    """The position after everything that the log holds at this moment, and that reads of the log show from now on.

    The token stands after what the primary has written, some of which a majority may not have got yet: neither a stream from the
    token nor a read of what a majority has would show that. So this waits until a majority has it.
    """
    with pymongo.timeout(MAJORITY_SECONDS):
        async with database.client.start_session() as session:
            reply = await database.command(
                {"aggregate": EVENTS, "pipeline": [{"$changeStream": {}}], "cursor": {"batchSize": 0}}, session=session
            )
            position = Position.of(reply["cursor"]["postBatchResumeToken"], reply["operationTime"])
            await _kill(database, reply["cursor"]["id"], session)
            # The token's time is the one after the last write, and may not be waited for before it has come.
            session.advance_operation_time(_before(position.cluster_time))
            await database[EVENTS].find_one({"_id": ""}, {"_id": 1}, session=session)
    return position


def _before(time: Timestamp) -> Timestamp:
    return Timestamp(time.time, time.inc - 1) if time.inc else Timestamp(time.time - 1, 0xFFFFFFFF)


async def _kill(database: Database, cursor_id: int, session: AsyncClientSession) -> None:
    if cursor_id:
        await database.command({"killCursors": EVENTS, "cursors": [Int64(cursor_id)]}, session=session)


class EventStream:
    """One change-stream cursor on the log, which reopens itself after failovers and restarts of its server.

    `slots` narrows it to a partition, `fields` to what the folds use (None: whole events). Raises PositionLostError from
    `next` when its position is dead; any other error of pymongo when MongoDB is away.
    """

    def __init__(
        self, database: Database, position: Position, *, slots: range = ALL_SLOTS, fields: Iterable[str] | None = None
    ) -> None:
        self._database = database
        self._slots = slots
        self._fields = None if fields is None else frozenset(fields)
        self._session: AsyncClientSession | None = None
        self._cursor_id = 0
        self._light = False
        self._stale = False
        self.position = position

    @property
    def fields(self) -> frozenset[str] | None:
        """The event fields that it delivers beside the fixed ones; None for all."""
        return self._fields

    def widen(self, fields: frozenset[str] | None) -> None:
        """Has all batches from the next call of `next` on bring these fields; the cursor is opened anew for it."""
        self._fields = fields
        self._stale = True

    async def next(self) -> Batch:
        """The next batch; an empty one, with a newer position, when nothing came for a while."""
        opening = False
        try:
            if self._stale:
                self._stale = False
                await self._forget_cursor()
            if not self._cursor_id:
                opening = True
                await self._open()
                opening = False
            reply = await self._database.command(
                {
                    "getMore": Int64(self._cursor_id),
                    "collection": EVENTS,
                    "batchSize": BATCH_EVENTS,
                    "maxTimeMS": WAIT_MS,
                },
                session=self._session,
                codec_options=CODEC,  # a command has none of the database's: its dates would be without a time zone
            )
        except Exception as error:
            self._cursor_id = 0
            match classify(error):
                case Meaning.POSITION_LOST:
                    raise PositionLostError(str(getattr(error, "code", None) or type(error).__name__)) from error
                case Meaning.REOPEN:
                    return Batch([], self.position)
                case Meaning.TOO_LARGE if not self._light:
                    self._light = True
                    return Batch([], self.position)
                case Meaning.UNEXPECTED if opening and isinstance(error, OperationFailure):
                    # Whatever the server has against it (servers differ in how they say so): if a stream can be opened
                    # without a token, it is the token.
                    await position_now(self._database)
                    raise PositionLostError(str(error.code)) from error
            raise
        return self._batch(reply)

    def _batch(self, reply: dict[str, Any]) -> Batch:
        cursor = reply["cursor"]
        if cursor.get("invalidated"):
            raise PositionLostError("invalidated")
        changes = cursor["nextBatch"]
        self._cursor_id = cursor["id"]
        before = self.position.cluster_time
        self.position = Position.of(cursor["postBatchResumeToken"], before)
        now = self.position.cluster_time
        head = reply.get("operationTime", now)
        light, self._light = self._light, False
        if light:
            self._stale = True  # the next cursor brings whole events again
        return Batch(
            [change["fullDocument"] for change in changes],
            self.position,
            changes[-1][_WALL_TIME] / 1000 if changes else None,
            drained=not changes or now.time >= head.time - 1,
            seconds=max(0, now.time - before.time),
            light=light,
        )

    async def _open(self) -> None:
        if self._session is None:
            self._session = self._database.client.start_session()
        every = self._slots == ALL_SLOTS
        match = {"operationType": "insert"} | (
            {} if every else {"fullDocument.slot": {"$gte": self._slots.start, "$lt": self._slots.stop}}
        )
        position = self.position
        start = (
            {"startAtOperationTime": position.cluster_time}
            if position.token is None
            else {"resumeAfter": position.token}
        )
        pipeline = [
            {"$changeStream": start},
            {"$match": match},
            {"$project": event_fields(() if self._light else self._fields)},
        ]
        reply = await self._database.command(
            {"aggregate": EVENTS, "pipeline": pipeline, "cursor": {"batchSize": 0}}, session=self._session
        )
        self._cursor_id = reply["cursor"]["id"]

    async def _forget_cursor(self) -> None:
        """Gives the server its cursor back; errors are of no interest any more."""
        cursor_id, self._cursor_id = self._cursor_id, 0
        if self._session is not None:
            with contextlib.suppress(PyMongoError):  # the server drops it by itself after 10 minutes
                await _kill(self._database, cursor_id, self._session)

    async def close(self) -> None:
        """Ends it."""
        await self._forget_cursor()
        if self._session is not None:
            await self._session.end_session()
            self._session = None
