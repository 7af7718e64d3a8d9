"""Where partitions get their batches: a change stream of their own, or a share of one that all near the head have.

A mongod delivers a bounded number of change events per second over all its streams together (bench/README.md), so
twenty streams of a process would each get a twentieth, and every event would be decoded twenty times. Partitions with
the same slots therefore share one stream as long as they keep up with it; who lags or has just begun reads on its own.

Nothing is lost in a change-over, since it overlaps: a partition has its place at the shared stream before it leaves its
own, and what it sees twice its marks tell. Post-batch tokens allow it: any filter can resume from them.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol

from eventstore import tasks
from projector.stream import BATCH_EVENTS, Batch, EventStream

if TYPE_CHECKING:
    from collections.abc import Iterable

    from eventstore.client import Database
    from projector.position import Position

__all__ = ["OwnSource", "Source", "Sources"]

AHEAD: Final = 3
"""Batches that wait for a partition: more would only be memory, for the writer is the slowest part."""

PATIENCE_SECONDS: Final = 1.0
"""How long the shared stream waits for a partition whose queue is full before it goes on without it. Shorter, and partitions
of like speed would be torn apart for nothing; longer, and one that is stuck would hold up the others."""


class Source(Protocol):
    """Where batches come from: a stream of one's own, or a share of the process's."""

    async def get(self, timeout: float) -> Batch | None:
        """The next batch, or None after `timeout` seconds. Raises PositionLostError and errors of pymongo."""

    async def close(self) -> None:
        """Ends it."""


async def _next(queue: asyncio.Queue[Batch | Exception], timeout: float) -> Batch | None:
    """The next batch of a queue, or None after `timeout` seconds; raises what is in it instead of one."""
    try:
        async with asyncio.timeout(timeout):
            found = await queue.get()
    except TimeoutError:
        return None
    if isinstance(found, Exception):
        raise found
    return found


class OwnSource:
    """A source that reads a change stream of its own, a few batches ahead."""

    def __init__(self, stream: EventStream, ahead: int = 2) -> None:
        self._stream = stream
        self._queue: asyncio.Queue[Batch | Exception] = asyncio.Queue(ahead)
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            while True:
                await self._queue.put(await self._stream.next())
        except Exception as error:  # noqa: BLE001 - handed to whoever asks next
            await self._queue.put(error)

    async def get(self, timeout: float) -> Batch | None:
        """The next batch, or None after `timeout` seconds; raises what the stream raised."""
        return await _next(self._queue, timeout)

    async def close(self) -> None:
        """Ends reading and gives the cursor back."""
        await tasks.end([self._task])
        await self._stream.close()


class _Share:
    """A partition's place at a shared stream."""

    def __init__(self, fields: frozenset[str] | None) -> None:
        self.fields = fields
        self.since: Position | None = None
        """The shared stream brings everything after this; None until it brings all the fields."""
        self.queue: asyncio.Queue[Batch | Exception] = asyncio.Queue(AHEAD)
        self.joined = False
        """Whether the partition reads from here; until then batches are only kept for it."""
        self.lost = False
        """The stream went on without this partition: it reads what it has, then on its own."""

    def reaches(self, position: Position) -> bool:
        """Whether a partition that has read up to this position misses nothing when it goes on from here.

        Later than `since`, not equal: events of one transaction have one time, and the stream may have stood among them.
        """
        if self.since is None or self.lost:
            return False
        return position.cluster_time > self.since.cluster_time or position == self.since


class _SharedStream:
    """One change stream for all partitions with the same slots."""

    def __init__(self, stream: EventStream, first: _Share) -> None:
        self._stream = stream
        self._waiting = [first]
        self._shares: list[_Share] = []
        self._ended = False
        self._task = asyncio.create_task(self._read())

    @property
    def alive(self) -> bool:
        """Whether it reads."""
        return not self._ended

    def join(self, share: _Share) -> None:
        """Gives a place from the next batch on, or from when the stream has been opened anew with more fields."""
        self._waiting.append(share)
        if not covers(self._stream.fields, share.fields):
            known = self._stream.fields or frozenset()
            self._stream.widen(None if share.fields is None else known | share.fields)

    def leave(self, share: _Share) -> None:
        """Gives a place up."""
        for places in (self._waiting, self._shares):
            if share in places:
                places.remove(share)

    async def _read(self) -> None:
        try:
            while self._waiting or self._shares:
                for share in [place for place in self._waiting if covers(self._stream.fields, place.fields)]:
                    self._waiting.remove(share)
                    self._shares.append(share)
                    share.since = self._stream.position
                batch = await self._stream.next()
                await asyncio.gather(*(self._hand_out(share, batch) for share in list(self._shares)))
        except Exception as error:  # noqa: BLE001 - handed to all who read
            for share in (*self._waiting, *self._shares):
                if share.queue.full():
                    share.lost = True  # it will find out by itself
                else:
                    share.queue.put_nowait(error)
        finally:
            self._ended = True
            await self._stream.close()

    async def _hand_out(self, share: _Share, batch: Batch) -> None:
        """Gives a batch to one partition, or takes its place away when it does not keep up with the others."""
        patience = None if len(self._shares) == 1 else PATIENCE_SECONDS
        try:
            async with asyncio.timeout(patience if share.joined else 0):
                await share.queue.put(batch)
        except TimeoutError:
            share.lost = True
            self.leave(share)

    async def close(self) -> None:
        """Ends it."""
        await tasks.end([self._task])


def covers(known: frozenset[str] | None, wanted: frozenset[str] | None) -> bool:
    """Whether a stream with the fields `known` brings those that are wanted; None stands for all."""
    return known is None or (wanted is not None and wanted <= known)


class _Source:
    """A partition's source: on its own, until it stands near the head and has a place at the shared stream."""

    def __init__(self, sources: Sources, position: Position, slots: range, fields: frozenset[str] | None) -> None:
        self._sources = sources
        self._position = position
        self._slots = slots
        self._fields = fields
        self._share: _Share | None = None
        self._own: OwnSource | None = self._alone()

    def _alone(self) -> OwnSource:
        return OwnSource(self._sources.stream(self._position, self._slots, self._fields))

    async def get(self, timeout: float) -> Batch | None:
        """The next batch, or None after `timeout` seconds; raises what the stream raised."""
        batch = await (self._from_share(timeout) if self._own is None else self._own.get(timeout))
        if batch is not None:
            self._position = batch.position
            if self._own is not None and len(batch.events) < BATCH_EVENTS:
                await self._change_over()
        return batch

    async def _from_share(self, timeout: float) -> Batch | None:
        share = self._share
        assert share is not None  # noqa: S101 - without a stream of its own it has one
        if share.lost and share.queue.empty():
            self._share, self._own = None, self._alone()
            return None
        return await _next(share.queue, timeout)

    async def _change_over(self) -> None:
        """Asks for a place at the shared stream; leaves the own one when nothing can be missed any more."""
        if self._share is None or self._share.lost:
            self._share = self._sources.join(self._position, self._slots, self._fields)
        if self._share.reaches(self._position) and self._own is not None:
            own, self._own = self._own, None
            self._share.joined = True
            await own.close()

    async def close(self) -> None:
        """Ends it."""
        if self._own is not None:
            await self._own.close()
        if self._share is not None:
            await self._sources.leave(self._share, self._slots)


class Sources:
    """The sources of a process."""

    def __init__(self, log: Database) -> None:
        self._log = log
        self._shared: dict[range, _SharedStream] = {}

    def open(self, position: Position, *, slots: range, fields: Iterable[str] | None) -> Source:
        """A source of batches after a position."""
        return _Source(self, position, slots, None if fields is None else frozenset(fields))

    def stream(self, position: Position, slots: range, fields: frozenset[str] | None) -> EventStream:
        """A change stream of one's own."""
        return EventStream(self._log, position, slots=slots, fields=fields)

    def join(self, position: Position, slots: range, fields: frozenset[str] | None) -> _Share:
        """A place at the shared stream of these slots, which begins at `position` when it is the first one."""
        share = _Share(fields)
        shared = self._shared.get(slots)
        if shared is not None and shared.alive:
            shared.join(share)
        else:
            share.since = position
            self._shared[slots] = _SharedStream(self.stream(position, slots, fields), share)
        return share

    async def leave(self, share: _Share, slots: range) -> None:
        """Gives a place up; the last one ends the stream."""
        shared = self._shared.get(slots)
        if shared is not None:
            shared.leave(share)

    async def close(self) -> None:
        """Ends all shared streams."""
        await asyncio.gather(*(shared.close() for shared in self._shared.values()))
        self._shared.clear()
