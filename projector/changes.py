"""What one transaction of a partition writes, and how a folder of events hands it over.

A folder keeps the marks of the aggregates it has seen (and, where that is safe, their documents), folds accepted events, and
from time to time is asked to `take` what has come together. There are two: `projector.owned` for documents that only this
partition writes, `projector.shared` for documents that several may write.
"""

from __future__ import annotations

import abc
import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import bson
from bson.raw_bson import RawBSONDocument
from pymongo.errors import WriteError

from eventstore.client import CODEC
from eventstore.errors import PASSING, meaning_of_code

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence

    from bson.int64 import Int64
    from pymongo.asynchronous.client_session import AsyncClientSession

    from eventstore.client import Database
    from projector.projection import Event, State

__all__ = [
    "Changes",
    "DocumentWrites",
    "EventFailedError",
    "Failure",
    "Folder",
    "Outcome",
    "StaleMarksError",
    "Tally",
    "Typical",
    "give_way",
    "read_documents",
    "unstorable",
    "write_documents",
]

MAX_DOCUMENT_BYTES: Final = 16 * 2**20 - 1024
"""MongoDB's limit for a document, less what a command puts around it."""

PORTION_BYTES: Final = 16 * 2**20
"""Documents that are read at once, about. Python needs some five to ten times the memory that they have as BSON."""

FIRST_GUESS_BYTES: Final = 16 * 2**10
"""A typical document, before one was seen. Too much costs a few small portions; too little, the memory of the pod."""

PENDING_EVENTS: Final = 10_000
"""Folded events that may wait for the writer. Two batches: one more than it needs to never wait for the reader."""

SLICE_SECONDS: Final = 0.05
"""How long a fold may hold up everything else in the process. Slow handlers get it again and again, each time after the others."""

PAUSE_SHARE: Final = 0.1
"""What the others get after a long slice, as a share of it: time for many of their steps, each of which would else wait for a slice
of its own. It costs a slow projection a tenth, and one of common speed nothing."""

FIRST_GUESS_SECONDS: Final = 1e-4
"""A typical fold, before one was seen: slow for a declared one, by which only the first batch of a partition is cut up."""

COMMAND_BYTES: Final = 12 * 2**20
"""Documents of one command: below the 16 MiB that MongoDB allows for it, with room for keys and session."""


class Failure(NamedTuple):
    """An event that could not be applied: which, in what step (`fold`, `write`, `gap`, `reset`), and why in words."""

    aggregate_id: str
    sequence_no: int
    event_id: str | None
    event_name: str | None
    category: str
    reason: str

    @classmethod
    def of(cls, event: Event, category: str, error: BaseException | str) -> Failure:
        """The failure of one event. The reason is cut, since an error may carry a whole document."""
        reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        return cls(
            event["aggregateId"],
            int(event["sequenceNo"]),
            event.get("_id"),
            event["eventName"],
            category,
            reason[:1_000],
        )


def unstorable(aggregate_id: str, error: BaseException | str) -> Failure:
    """The failure of an aggregate whose document cannot be stored. Which event made it so is not known yet (0)."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return Failure(aggregate_id, 0, None, None, "write", reason[:1_000])


class EventFailedError(Exception):
    """Raised inside the transaction for the event that stands in its way."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


class StaleMarksError(Exception):
    """Marks in memory are not those in MongoDB: nothing was written, and the partition must begin again.

    It happens when marks were read from a primary just elected, which did not know yet what a majority had. Documents that are
    read within the transaction would otherwise get events twice.
    """

    def __init__(self, aggregates: int) -> None:
        super().__init__(f"{aggregates} marks are others than they were when they were read")


@dataclass(slots=True)
class Tally:
    """How many events met which fate."""

    applied: int = 0
    unhandled: int = 0
    duplicate: int = 0
    aside: int = 0


@dataclass(slots=True)
class Outcome:
    """What folding a batch found: aggregates with a gap before this sequenceNo, failed events, the last sequenceNo of each
    aggregate that was passed over because it is aside, and counts."""

    gaps: dict[str, int] = field(default_factory=dict)
    passed: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)


class Statements:
    """Parts of write commands of one kind, each with its size as BSON and the aggregate that it comes from.

    Encoded once, when they are added, since folding goes on in the same documents while these are being written.
    """

    __slots__ = ("authors", "parts", "sizes")

    def __init__(self) -> None:
        self.parts: list[RawBSONDocument] = []
        self.sizes: list[int] = []
        self.authors: list[str] = []

    def add(self, part: dict[str, Any], author: str) -> int:
        """Adds a part; returns its size. Raises ValueError when it is too large, and what bson raises for what it cannot encode."""
        raw = bson.encode(part)
        size = len(raw)
        if size > MAX_DOCUMENT_BYTES:
            raise ValueError(f"the document would have {size} bytes, more than the 16 MiB that MongoDB allows")
        self.parts.append(RawBSONDocument(raw))
        self.sizes.append(size)
        self.authors.append(author)
        return size

    def without(self, authors: Collection[str]) -> Statements:
        """The same without the parts of some aggregates."""
        kept = Statements()
        for part, size, each in zip(self.parts, self.sizes, self.authors, strict=True):
            if each not in authors:
                kept.parts.append(part)
                kept.sizes.append(size)
                kept.authors.append(each)
        return kept


@dataclass(slots=True)
class DocumentWrites:
    """Writes to one collection and to its marks."""

    inserts: Statements = field(default_factory=Statements)
    replaces: Statements = field(default_factory=Statements)
    deletes: list[Any] = field(default_factory=list)
    marks: dict[str, Int64] = field(default_factory=dict)
    marks_before: dict[str, int] | None = None
    """What the marks must be for the writes to be right (0: there is none); None where they may be anything lower."""

    def store(self, document: State, author: str, *, stored: bool) -> int:
        """Adds the write of a document, which MongoDB has (`stored`) or not; returns its size. Raises what `add` raises."""
        if stored:
            return self.replaces.add({"q": {"_id": document["_id"]}, "u": document, "upsert": True}, author)
        return self.inserts.add(document, author)


class Changes(abc.ABC):
    """Changes of a number of aggregates, written by one transaction."""

    events: int

    @property
    @abc.abstractmethod
    def aggregates(self) -> Mapping[str, int]:
        """The aggregates that it changes, with the last sequenceNo of each."""

    @abc.abstractmethod
    async def write(self, session: AsyncClientSession) -> None:
        """Writes them within the transaction. Raises EventFailedError for an event that cannot be written."""

    @abc.abstractmethod
    def without(self, aggregate_id: str) -> Changes:
        """The same without one aggregate."""

    @property
    @abc.abstractmethod
    def divisible(self) -> bool:
        """Whether there are two parts in it."""

    @abc.abstractmethod
    def halves(self) -> tuple[Changes, Changes]:
        """The same in two parts, to be written one after the other."""


class Typical:
    """What a document and a fold cost, learned from those before: larger and slower ones count at once, others little by little."""

    def __init__(self) -> None:
        self.bytes = FIRST_GUESS_BYTES
        self.fold_seconds = FIRST_GUESS_SECONDS
        """Of what `Folder.fold` does with an event."""
        self.write_seconds = FIRST_GUESS_SECONDS
        """Of what is folded only within the transaction."""

    def learn_bytes(self, documents: int, size: int) -> None:
        """Some documents had this size together."""
        if documents:
            seen = max(1, size // documents)
            self.bytes = seen if seen > self.bytes else (7 * self.bytes + seen) // 8

    def learn_fold(self, events: int, seconds: float) -> None:
        """Some events took this long together."""
        if events:
            self.fold_seconds = _learned(self.fold_seconds, seconds / events)

    def learn_write(self, folds: int, seconds: float) -> None:
        """Some folds took this long together."""
        if folds:
            self.write_seconds = _learned(self.write_seconds, seconds / folds)


def _learned(known: float, seen: float) -> float:
    return seen if seen > known else max(1e-7, (7 * known + seen) / 8)


class Folder(abc.ABC):
    """Order check and fold of one partition's events, in memory."""

    typical: Typical

    @abc.abstractmethod
    async def load(self, aggregate_ids: set[str]) -> None:
        """Sees to it that the marks (and documents) of these aggregates are in memory until the next call."""

    @abc.abstractmethod
    def fold(self, events: Sequence[Event], aside: Collection[str]) -> Outcome:
        """Checks the order and folds; every aggregate must be in memory. Aggregates in `aside` are passed over."""

    @abc.abstractmethod
    def mark(self, aggregate_id: str) -> int:
        """The mark of an aggregate in memory."""

    @abc.abstractmethod
    def skip(self, aggregate_id: str, sequence_no: int) -> None:
        """Moves the mark over an event that shall not be applied."""

    @abc.abstractmethod
    def discard(self, aggregate_id: str) -> None:
        """Forgets an aggregate and all its changes that were not taken yet."""

    @property
    @abc.abstractmethod
    def pending(self) -> int:
        """Changes that wait to be taken: events, and as many times as they go to several documents."""

    @property
    @abc.abstractmethod
    def pending_bytes(self) -> int:
        """About how large the documents are that wait to be taken."""

    @property
    @abc.abstractmethod
    def limit(self) -> int:
        """How many changes may wait."""

    @property
    def portion(self) -> int:
        """How many events may be folded in one go: fewer, the larger the documents are and the longer a fold takes."""
        by_time = int(SLICE_SECONDS / self.typical.fold_seconds)
        return max(1, min(PORTION_BYTES // self.typical.bytes, by_time, self.limit))

    def prepare(self) -> None:  # noqa: B027 - most have nothing to do
        """Does already what it can of the next `take`: worth it while the writes before are still under way."""

    @abc.abstractmethod
    def take(self) -> tuple[Changes, list[Failure]]:
        """Hands over all changes since the last time, and the failures of those that cannot be stored."""


async def give_way(seconds: float) -> None:
    """Lets others in the process go on, after this one has held them up for so long."""
    await asyncio.sleep(PAUSE_SHARE * seconds if seconds > SLICE_SECONDS / 2 else 0)


async def read_documents(
    database: Database, collection: str, keys: list[Any], session: AsyncClientSession | None = None
) -> AsyncIterator[list[tuple[dict[str, Any], int]]]:
    """The documents with these keys, each with its size in bytes, in batches of at most 16 MiB."""
    cursor = database[collection].find_raw_batches({"_id": {"$in": keys}}, session=session, batch_size=len(keys) + 1)
    try:
        async for batch in cursor:
            raw = cast("bytes", batch)
            sizes, at = [], 0
            while at < len(raw):
                sizes.append(int.from_bytes(raw[at : at + 4], "little"))  # a document begins with its length
                at += sizes[-1]
            yield list(zip(bson.decode_all(raw, CODEC), sizes, strict=True))
    finally:
        await cursor.close()


async def write_documents(
    database: Database, collection: str, marks: str, writes: DocumentWrites, session: AsyncClientSession
) -> None:
    """Carries writes out within the transaction of `session`. Raises EventFailedError naming the aggregate of a refusal."""
    for name, field_, statements in (("insert", "documents", writes.inserts), ("update", "updates", writes.replaces)):
        for start, end in _chunks(statements.sizes):
            command = {name: collection, field_: statements.parts[start:end], "ordered": False}
            await _run(database, command, session, statements.authors[start:end])
    if writes.deletes:
        await database[collection].delete_many({"_id": {"$in": writes.deletes}}, session=session)
    if writes.marks:
        await _write_marks(database, marks, writes, session)


async def _write_marks(database: Database, marks: str, writes: DocumentWrites, session: AsyncClientSession) -> None:
    before = writes.marks_before
    updates: list[dict[str, Any]] = []
    for aggregate_id, mark in writes.marks.items():
        if before is None:
            updates.append({"q": {"_id": aggregate_id}, "u": {"$max": {"mark": mark}}, "upsert": True})
        else:
            known = before[aggregate_id]
            query = {"_id": aggregate_id, "mark": known} if known else {"_id": aggregate_id}
            change = {"$set" if known else "$setOnInsert": {"mark": mark}}
            updates.append({"q": query, "u": change, "upsert": not known})
    reply = await _run(database, {"update": marks, "updates": updates, "ordered": False}, session, list(writes.marks))
    written = reply.get("nModified", 0) + len(reply.get("upserted", ()))
    if before is not None and written != len(updates):
        raise StaleMarksError(len(updates) - written)


def _chunks(sizes: list[int]) -> list[tuple[int, int]]:
    """Ranges of documents that fit into a command."""
    chunks: list[tuple[int, int]] = []
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and total + size > COMMAND_BYTES:
            chunks.append((start, index))
            start, total = index, 0
        total += size
    if len(sizes) > start:
        chunks.append((start, len(sizes)))
    return chunks


async def _run(
    database: Database, command: dict[str, Any], session: AsyncClientSession, authors: list[str]
) -> dict[str, Any]:
    """Runs a write command as it is: pymongo's bulk API costs twice the time for the same bytes (bench/README.md).

    Raises EventFailedError for a document that MongoDB refuses.
    """
    reply: dict[str, Any] = await database.command(command, session=session)
    if errors := reply.get("writeErrors"):
        first = errors[0]
        if meaning_of_code(first.get("code")) in PASSING:
            raise WriteError(str(first.get("errmsg")), first.get("code"), first)
        reason = f"MongoDB refused the document: {first.get('errmsg', first.get('code'))}"
        raise EventFailedError(unstorable(authors[first["index"]], reason))
    return reply
