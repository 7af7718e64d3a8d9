"""Index builds in the background: a handler starts one, returns, and looks again later.

`createIndexes` answers when the build has ended, so it runs in a task of its own, without maxTimeMS (which would abort
the build) and on a client without a socket timeout. When the operator ends or is killed, the server builds on; the next
operator measures the build and joins it by asking for the same index again, to learn how it ends. Nothing here is
needed for correctness, then: what is lost with the process is only the memory of failures.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import structlog
from bson import json_util
from pymongo.errors import OperationFailure, PyMongoError

from eventstore.errors import PASSING, Meaning, classify

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from eventstore.client import Database
    from projector.operator.indexes import Index
    from projector.operator.mongo import Mongo

__all__ = ["Builder", "Failure", "Target"]

_log: Final = structlog.stdlib.get_logger(__name__)

_MAJORITY: Final = {"w": "majority"}
_SAMPLE: Final = 5
"""Offending documents that are named: enough to see the pattern, few enough to read."""
_SAMPLE_MS: Final = 5_000
"""The search for them scans the collection (the index is missing, after all); rather no sample than a long scan."""
_FIRST_RETRY_SECONDS: Final = 60.0
_LAST_RETRY_SECONDS: Final = 3_600.0
"""A failing build reads the whole collection each time, so it is retried seldom; a new spec is tried at once."""
_GRACE_SECONDS: Final = 0.5
"""So long a handler waits for a build: on a small collection it is done at once, and the status need not say so twice."""
_CANNOT_CONVERT: Final = 359


class Target(NamedTuple):
    """A collection whose indexes are managed."""

    mongo: Mongo
    database: str
    collection: str

    @property
    def namespace(self) -> str:
        """Database and collection, as MongoDB writes them."""
        return f"{self.database}.{self.collection}"

    @property
    def key(self) -> tuple[int, str, str]:
        """Tells collections of different servers apart."""
        return id(self.mongo), self.database, self.collection


@dataclass(frozen=True)
class Failure:
    """How the build of an index failed."""

    reason: str
    """The server's name for it: DuplicateKey, IndexOptionsConflict …"""
    message: str
    attempts: int
    at: float
    """`time.monotonic` of the last attempt."""
    sample: tuple[Any, ...] = ()
    """`_id` of documents that are in the way."""


@dataclass
class _Collection:
    """What goes on at one collection: one task at a time, since builds on one collection compete for it."""

    task: asyncio.Task[None] | None = None
    names: frozenset[str] = frozenset()
    failures: dict[str, Failure] = field(default_factory=dict)


class Builder:
    """All index builds of the operator."""

    def __init__(self) -> None:
        self._collections: dict[tuple[int, str, str], _Collection] = {}

    def running(self, target: Target) -> frozenset[str]:
        """Names of the indexes of a collection that a task of ours waits for."""
        state = self._collections.get(target.key)
        return state.names if state and state.task and not state.task.done() else frozenset()

    def failure(self, target: Target, index: Index) -> Failure | None:
        """How the last build of exactly this index failed; None when it did not, or was not tried."""
        state = self._collections.get(target.key)
        return state.failures.get(_identity(index)) if state else None

    async def blocked(self, target: Target, index: Index) -> Failure | None:
        """The failure that speaks against another attempt now; None when one should be made.

        An attempt is due when its time has come, or when the documents that were in the way no longer are.
        """
        failure = self.failure(target, index)
        if failure is None:
            return None
        waited = time.monotonic() - failure.at
        if waited >= min(_LAST_RETRY_SECONDS, _FIRST_RETRY_SECONDS * 2 ** (failure.attempts - 1)):
            return None
        # The first time at once, then seldom: each attempt may find the next pair of duplicates.
        soon = failure.attempts == 1 or waited >= _FIRST_RETRY_SECONDS
        if failure.sample and soon and not await _still_duplicates(target, index, failure.sample):
            return None
        return failure

    async def build(self, target: Target, indexes: Sequence[Index], done: Callable[[], None]) -> None:
        """Starts to build indexes, or joins their builds, and calls `done` at the end; waits for a moment only.

        Does nothing while a task is at this collection: the pass that `done` calls for goes on.
        """
        await self._start(target, indexes, done, _create_all(self, target, indexes))

    async def make_unique(self, target: Target, index: Index, done: Callable[[], None]) -> None:
        """Starts to make an index unique by collMod, which reads the whole index."""
        await self._start(target, [index], done, _convert(self, target, index))

    async def _start(
        self, target: Target, indexes: Sequence[Index], done: Callable[[], None], work: Coroutine[Any, Any, None]
    ) -> None:
        state = self._collections.setdefault(target.key, _Collection())
        if state.task is not None and not state.task.done():
            work.close()
            return

        async def run() -> None:
            try:
                await work
            finally:
                done()

        state.names = frozenset(index.name for index in indexes)
        state.task = asyncio.create_task(run(), name=f"build indexes of {target.namespace}")
        await asyncio.wait([state.task], timeout=_GRACE_SECONDS)

    def succeeded(self, target: Target, index: Index) -> None:
        """Forgets that the index failed."""
        self._collections.setdefault(target.key, _Collection()).failures.pop(_identity(index), None)

    def failed(self, target: Target, index: Index, reason: str, message: str, sample: Sequence[Any] = ()) -> None:
        """Remembers how the index failed, and when it may be tried again."""
        failures = self._collections.setdefault(target.key, _Collection()).failures
        before = failures.get(_identity(index))
        attempts = before.attempts + 1 if before else 1
        failures[_identity(index)] = Failure(reason, message, attempts, time.monotonic(), tuple(sample))
        _log.warning("index_failed", namespace=target.namespace, index=index.name, reason=reason)

    def keep(self, target: Target, indexes: Sequence[Index]) -> None:
        """Forgets what is known of other indexes of a collection than these, and of one where nothing goes on."""
        state = self._collections.get(target.key)
        if state is None:
            return
        wanted = {_identity(index) for index in indexes}
        state.failures = {identity: failure for identity, failure in state.failures.items() if identity in wanted}
        if not state.failures and (state.task is None or state.task.done()):
            del self._collections[target.key]

    async def close(self) -> None:
        """Ends all tasks; the builds go on in the server."""
        tasks = [state.task for state in self._collections.values() if state.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._collections.clear()


def _identity(index: Index) -> str:
    return f"{index.name}/{index.digest()}"


async def _create_all(builder: Builder, target: Target, indexes: Sequence[Index]) -> None:
    """All of them by one command, so that the collection is scanned once; one that fails must not hinder the others."""
    left = list(indexes)
    while left:
        try:
            await _create(target, left)
        except OperationFailure as error:
            if classify(error) in PASSING:
                return  # the connection ended, not the build: measuring tells what became of it
            culprit = _culprit(left, error)
            if culprit is None:
                for index in left:
                    await _create_all(builder, target, [index])
                return
            await _record(builder, target, culprit, error)
            left.remove(culprit)
        except PyMongoError:
            return
        else:
            for index in left:
                builder.succeeded(target, index)
            return


def _culprit(indexes: Sequence[Index], error: OperationFailure) -> Index | None:
    """The index that an error is about; None when that cannot be told."""
    if len(indexes) == 1:
        return indexes[0]
    keys = tuple(((error.details or {}).get("keyPattern") or {}).items())
    found = [index for index in indexes if index.unique and index.keys == keys]
    return found[0] if len(found) == 1 else None


async def _create(target: Target, indexes: Sequence[Index]) -> None:
    await target.mongo.build_database(target.database).command(
        "createIndexes",
        target.collection,
        indexes=[index.document() for index in indexes],
        writeConcern=_MAJORITY,
        comment="eventprojector",
    )


async def _convert(builder: Builder, target: Target, index: Index) -> None:
    """First no new duplicates, then the check of the old ones; what cannot be made unique is as before."""
    database = target.mongo.build_database(target.database)

    async def modify(**options: Any) -> None:
        await database.command(
            "collMod", target.collection, index={"name": index.name} | options, writeConcern=_MAJORITY
        )

    try:
        await modify(prepareUnique=True)
        try:
            await modify(unique=True)
        except OperationFailure as error:
            if classify(error) not in PASSING:
                await modify(prepareUnique=False)
                await _record(builder, target, index, error)
        else:
            builder.succeeded(target, index)
    except OperationFailure as error:
        if classify(error) not in PASSING:
            await _record(builder, target, index, error)
    except PyMongoError:
        return


async def _record(builder: Builder, target: Target, index: Index, error: OperationFailure) -> None:
    details = error.details or {}
    reason = str(details.get("codeName") or f"Code{error.code}")
    sample: list[Any] = []
    if classify(error) is Meaning.DUPLICATE:
        values = details.get("keyValue") or {}
        sample = await _documents_with(target, index, values)
        message = f"index {index.name}: more than one document has {_text(values)}"
    elif error.code == _CANNOT_CONVERT:
        reason = "DuplicateKey"
        groups = [violation.get("ids", []) for violation in details.get("violations", [])]
        sample = [identity for group in groups for identity in group][:_SAMPLE]
        message = f"index {index.name}: cannot become unique, {len(groups)} values occur more than once"
    else:
        message = f"index {index.name}: {details.get('errmsg', error)}"[:500]
    if sample:
        message += f"; for example the documents with _id {', '.join(_text(identity) for identity in sample)}"
    builder.failed(target, index, reason, message, sample)


async def _documents_with(target: Target, index: Index, values: dict[str, Any]) -> list[Any]:
    """The `_id` of some documents that have the values of a duplicate key."""
    query = _indexed(index, {"$and": [{name: value} for name, value in values.items()]} if values else {})
    cursor = _database(target)[target.collection].find(
        query, {"_id": 1}, limit=_SAMPLE, max_time_ms=_SAMPLE_MS, collation=index.collation
    )
    try:
        return [row["_id"] async for row in cursor]
    except PyMongoError:
        return []  # a sample is a courtesy


async def _still_duplicates(target: Target, index: Index, sample: Sequence[Any]) -> bool:
    """Whether two of these documents have the same values still."""
    names = {f"k{number}": f"${name}" for number, (name, _) in enumerate(index.keys)}
    pipeline: list[dict[str, Any]] = [
        {"$match": _indexed(index, {"_id": {"$in": list(sample)}})},
        {"$group": {"_id": names, "n": {"$sum": 1}}},
        {"$match": {"n": {"$gt": 1}}},
        {"$limit": 1},
    ]
    cursor = await _database(target)[target.collection].aggregate(
        pipeline, maxTimeMS=_SAMPLE_MS, collation=index.collation
    )
    return bool(await cursor.to_list(1))


def _indexed(index: Index, query: dict[str, Any]) -> dict[str, Any]:
    """The query, of the documents that the index has."""
    return {"$and": [query, dict(index.partial_filter)]} if index.partial_filter else query


def _database(target: Target) -> Database:
    return target.mongo.database(target.database)


def _text(value: Any) -> str:
    """A value for a message: relaxed Extended JSON, cut where it is long."""
    text = json_util.dumps(value, json_options=json_util.RELAXED_JSON_OPTIONS)
    return text if len(text) <= 120 else f"{text[:119]}…"
