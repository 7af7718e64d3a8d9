"""Proof that a read model is what the log says: its marks against all heads, its documents against a fresh fold.

Writers may go on meanwhile. A mark that is behind is looked at again for some seconds, since the projector may just be about to
apply what is missing; a document is compared with the fold of the events up to its own mark, which the log never changes. A
document that several aggregates write is compared within one snapshot, in which all marks and documents are of one moment.
"""

from __future__ import annotations

import asyncio
import math
import time
import zlib
from typing import TYPE_CHECKING, Any, Final

import bson
from msgspec import Struct, field
from pymongo.errors import OperationFailure

from eventstore import log as event_log
from eventstore.client import CODEC
from eventstore.event import EVENTS
from projector.applied import first_pending, marks_of_aggregates
from projector.behind import differences, marks_of
from projector.owned import MARK
from projector.parking import PARKED, parked_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from pymongo.asynchronous.client_session import AsyncClientSession

    from eventstore.client import Database
    from projector.build import Build
    from projector.builds import BuildRecord
    from projector.projection import Event, State

__all__ = ["Finding", "Verification", "verify"]

MOST_FINDINGS: Final = 100
"""Enough to see the pattern; whoever has more rebuilds."""

GRACE_SECONDS: Final = 10.0
"""How long a mark may stay behind before that is a finding. A projector that keeps up needs a tenth of a second; to report
a healthy read model as broken is the dearer mistake."""

CHUNK: Final = 200
"""Aggregates looked at by one query, whose `$or` has a branch for each."""

DOCUMENTS_AT_ONCE: Final = 20_000
"""Documents of several aggregates that are folded in memory at once; more are done in several passes over the log."""

_SNAPSHOT_TOO_OLD: Final = 239


class Finding(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Something that is not as the log says."""

    kind: str
    """`behind`: events are not applied; `parked`: nor will they be, until somebody acts; `ahead`: the log has fewer events
    than were applied; `gap`: the log lacks an event; `document`: it is not what a fresh fold gives."""
    key: Any
    """The aggregate, or the document's `_id`."""
    detail: str
    mark: int | None = None
    head: int | None = None


class Verification(Struct, frozen=True, kw_only=True, rename="camel"):
    """What was compared, and what was found."""

    name: str
    build: str
    documents: int
    """Documents compared with a fresh fold."""
    seconds: float
    findings: list[Finding] = field(default_factory=list)
    truncated: bool = False
    """There were more findings than are listed; the rest was not looked at."""
    incomplete: str | None = None
    """Why not everything could be compared."""

    @property
    def ok(self) -> bool:
        """Whether everything was compared and nothing found."""
        return not self.findings and self.incomplete is None


async def verify(
    log: Database,
    database: Database,
    build: Build,
    record: BuildRecord,
    *,
    sample: int | None = None,
    grace_seconds: float = GRACE_SECONDS,
) -> Verification:
    """Compares a build with the log; `sample` is about how many documents (None: all, 0: none). Memory is bounded."""
    started = time.monotonic()
    check = _Check(log, database, build, record, grace_seconds)
    incomplete = None
    try:
        await check.marks()
        if sample == 0:
            pass
        elif build.projection.aggregate_keyed:
            await check.owned_documents(sample)
        else:
            await check.shared_documents(sample)
    except _EnoughError:
        pass
    except OperationFailure as error:
        if error.code != _SNAPSHOT_TOO_OLD:
            raise
        incomplete = (
            "reading took longer than MongoDB keeps a snapshot (minSnapshotHistoryWindowInSeconds); take a sample"
        )
    return Verification(
        name=build.projection.name,
        build=build.id,
        documents=check.documents,
        seconds=round(time.monotonic() - started, 3),
        findings=check.findings[:MOST_FINDINGS],
        truncated=len(check.findings) > MOST_FINDINGS,
        incomplete=incomplete,
    )


class _EnoughError(Exception):
    """There are more findings than anybody reads."""


class _Check:
    """One verification."""

    def __init__(
        self, log: Database, database: Database, build: Build, record: BuildRecord, grace_seconds: float
    ) -> None:
        self._log = log
        self._database = database
        self._build = build
        self._record = record
        self._projection = build.projection
        self._grace_seconds = grace_seconds
        self.findings: list[Finding] = []
        self.documents = 0

    def _found(self, kind: str, key: Any, detail: str, *, mark: int | None = None, head: int | None = None) -> None:
        self.findings.append(Finding(kind=kind, key=key, detail=detail, mark=mark, head=head))
        if len(self.findings) > MOST_FINDINGS:
            raise _EnoughError

    # Marks

    async def marks(self) -> None:
        """Compares all marks with all heads."""
        chunk: dict[str, int] = {}
        async for found in differences(self._log, self._database, self._build):
            chunk[found.aggregate_id] = found.head
            if len(chunk) == CHUNK:
                await self._settle(chunk)
                chunk = {}
        await self._settle(chunk)

    async def _settle(self, heads: dict[str, int]) -> None:
        """Looks again at aggregates whose marks were not their heads, until they are or the time is over."""
        deadline = time.monotonic() + self._grace_seconds
        pause = 0.05
        while heads:
            marks = await marks_of_aggregates(self._database, self._record, heads)
            now = await event_log.heads(self._log, list(heads))  # read after the marks, so none of them can be ahead
            ahead = {name for name in heads if marks[name] > now.get(name, 0)}
            behind = {name: marks[name] for name in heads if name not in ahead}
            pending = await first_pending(self._log, self._projection, behind, heads)
            heads = {name: head for name, head in heads.items() if name in ahead or name in pending}
            if not heads:
                return
            if time.monotonic() >= deadline:
                await self._report(heads, marks, now, ahead, pending)
                return
            await asyncio.sleep(pause)
            pause = min(0.25, pause * 1.5)

    async def _report(
        self,
        heads: Mapping[str, int],
        marks: Mapping[str, int],
        now: Mapping[str, int],
        ahead: set[str],
        pending: Mapping[str, int],
    ) -> None:
        ids = {parked_id(self._record.id, name): name for name in heads}
        rows = self._database[PARKED].find({"_id": {"$in": list(ids)}})
        parked = {row["aggregateId"]: row async for row in rows}
        for name in heads:
            mark, head = marks[name], now.get(name, 0)
            if row := parked.get(name):
                text = f"set aside at event {row['sequenceNo']} ({row['category']}): {row['reason']}"
                self._found("parked", name, text, mark=mark, head=head)
            elif name in ahead:
                self._found("ahead", name, f"{mark} events were applied, the log has {head}", mark=mark, head=head)
            else:
                self._found("behind", name, f"event {pending[name]} is not applied", mark=mark, head=head)

    # Documents of one aggregate

    async def owned_documents(self, sample: int | None) -> None:
        """Compares documents with the fold of their aggregate up to their mark."""
        chunk: list[str] = []
        async for aggregate_id in self._aggregates(sample):
            chunk.append(aggregate_id)
            if len(chunk) == CHUNK:
                await self._compare_owned(chunk)
                chunk = []
        await self._compare_owned(chunk)

    async def _aggregates(self, sample: int | None) -> AsyncIterator[str]:
        if sample is None:
            async for aggregate_id, _ in marks_of(self._database, self._build):
                yield aggregate_id
            return
        for collection in (
            self._build.collection,
            self._build.marks,
        ):  # those that have a document, and the deleted ones
            stages: list[dict[str, Any]] = [{"$sample": {"size": sample}}, {"$project": {"_id": 1}}]
            async for row in await self._database[collection].aggregate(stages):
                yield row["_id"]

    async def _compare_owned(self, ids: Sequence[str]) -> None:
        if not ids:
            return
        wanted = {"_id": {"$in": list(ids)}}
        documents = {row["_id"]: row async for row in self._database[self._build.collection].find(wanted)}
        beside = {row["_id"]: int(row["mark"]) async for row in self._database[self._build.marks].find(wanted)}
        marks = {}
        for name in ids:
            mark = int(documents[name].get(MARK, 0)) if name in documents else beside.get(name)
            if mark is not None:
                marks[name] = mark
        states: dict[str, State | None] = dict.fromkeys(marks)
        broken: set[str] = set()
        async for event in self._events(marks, broken):
            name = event["aggregateId"]
            try:
                states[name] = self._projection.apply(name, states[name], event)
            except Exception as error:  # noqa: BLE001 - a handler may raise anything
                self._unfoldable(name, event, error)
                broken.add(name)
        for name in marks.keys() - broken:
            self.documents += 1
            stored = documents.get(name)
            if stored is not None:
                stored.pop(MARK, None)
            if difference := _difference(name, stored, states[name], any_order=False):
                self._found("document", name, difference, mark=marks[name])

    async def _events(self, marks: Mapping[str, int], broken: set[str]) -> AsyncIterator[Event]:
        """The events of these aggregates up to their marks, each in order; adds to `broken` those that have a gap."""
        query = {"aggregateId": {"$in": [name for name, mark in marks.items() if mark]}}
        cursor = self._log[EVENTS].find(query, self._fields()).sort([("aggregateId", 1), ("sequenceNo", 1)])
        at = dict.fromkeys(marks, 0)
        async for event in cursor:
            name, number = event["aggregateId"], int(event["sequenceNo"])
            if name in broken or number > marks[name]:
                continue
            if number != at[name] + 1:
                self._gap(name, at[name] + 1, marks[name])
                broken.add(name)
                continue
            at[name] = number
            yield event
        for name in marks.keys() - broken:
            if at[name] < marks[name]:
                self._gap(name, at[name] + 1, marks[name])
                broken.add(name)

    def _fields(self) -> list[str] | None:
        fields = self._projection.fields
        return None if fields is None else ["aggregateId", "sequenceNo", "eventName", *fields]

    def _gap(self, name: str, number: int, mark: int) -> None:
        self._found("gap", name, f"the log has no event {number}, but {mark} were applied", mark=mark)

    def _unfoldable(self, name: Any, event: Event, error: Exception) -> None:
        which = f"event {int(event['sequenceNo'])} of {event['aggregateId']}"
        text = f"{which} cannot be folded ({type(error).__name__}: {error!s:.300}); was it skipped?"
        self._found("document", name, text)

    # Documents of several aggregates

    async def shared_documents(self, sample: int | None) -> None:
        """Compares documents with the fold of all events that go to them, up to the marks of one moment."""
        count = await self._database[self._build.collection].estimated_document_count()
        share = max(1, -(-count // min(sample or DOCUMENTS_AT_ONCE, DOCUMENTS_AT_ONCE)))
        for part in range(share if sample is None else 1):
            async with self._database.client.start_session(snapshot=True) as session:
                await self._compare_shared(session, share, part)

    async def _compare_shared(self, session: AsyncClientSession, share: int, part: int) -> None:
        """One `share`th of the keys: those whose hash falls to this part."""

        def mine(key: Any) -> bool:
            return share == 1 or zlib.crc32(bson.encode({"": key})) % share == part

        cursor = self._database[self._build.collection].find({}, session=session)
        documents = {row["_id"]: row async for row in cursor if mine(row["_id"])}
        states: dict[Any, State | None] = {}
        broken: set[Any] = set()
        chunk: dict[str, int] = {}
        marks = self._database[self._build.marks].find({}, session=session).sort("_id", 1)
        async for row in marks:
            chunk[row["_id"]] = int(row["mark"])
            if len(chunk) == CHUNK:
                await self._fold_shared(chunk, states, broken, mine)
                chunk = {}
        await self._fold_shared(chunk, states, broken, mine)
        for key in documents.keys() | states.keys():
            if key in broken:
                continue
            self.documents += 1
            if difference := _difference(key, documents.get(key), states.get(key), any_order=True):
                self._found("document", key, difference)

    async def _fold_shared(
        self, marks: Mapping[str, int], states: dict[Any, State | None], broken: set[Any], mine: Any
    ) -> None:
        async for event in self._events(marks, set()):
            if not self._projection.handles(event["eventName"]):
                continue
            try:
                keys = [key for key in self._projection.keys(event) if mine(key)]
            except Exception as error:  # noqa: BLE001 - a key function may raise anything
                self._unfoldable(event["aggregateId"], event, error)
                continue
            for key in keys:
                if key in broken:
                    continue
                try:
                    states[key] = self._projection.apply(key, states.get(key), event)
                except Exception as error:  # noqa: BLE001 - a handler may raise anything
                    self._unfoldable(key, event, error)
                    broken.add(key)


def _difference(key: Any, stored: dict[str, Any] | None, folded: State | None, *, any_order: bool) -> str | None:
    """How a document differs from a fold, by its first field; None when it does not.

    With `any_order`, arrays are compared without their order and numbers up to rounding: between aggregates no order is
    promised, so `$addToSet` and sums of fractions may come out either way.
    """
    if stored is None or folded is None:
        if stored is folded:
            return None
        return "it is missing" if stored is None else "it is there, but the events say that it is not"
    fresh = bson.decode(bson.encode({"_id": key, **folded}), CODEC)  # as MongoDB would give it back
    for name in sorted({*stored, *fresh}):
        if name == MARK:
            continue
        if name not in stored:
            return f"{name}: it is missing, and should be {fresh[name]!r:.200}"
        if name not in fresh:
            return f"{name}: it is {stored[name]!r:.200}, and should not be there"
        if not _same(stored[name], fresh[name], any_order=any_order):
            return f"{name}: it is {stored[name]!r:.200}, and should be {fresh[name]!r:.200}"
    return None


def _same(one: Any, other: Any, *, any_order: bool) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key], any_order=any_order) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        if any_order:
            one, other = sorted(one, key=_order), sorted(other, key=_order)
        return len(one) == len(other) and all(_same(a, b, any_order=any_order) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float):
        close = any_order and math.isclose(one, other, rel_tol=1e-9)
        return one == other or close or (math.isnan(one) and math.isnan(other))
    kinds = {bool if isinstance(each, bool) else int if isinstance(each, int) else type(each) for each in (one, other)}
    equal: bool = len(kinds) == 1 and one == other  # int32 and int64 are one number
    return equal


def _order(value: Any) -> bytes:
    return bson.encode({"": value})
