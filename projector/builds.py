"""Which builds a projection has, and which of them readers see.

`projector.builds` has a document per build, `projector.projections` one per projection: its *live* build (behind the view), the
*candidate* that is being built or catches up to take its place, and the *previous* one, to which a rollback returns. All changes
are conditional on what was read, since any replica may make them.
"""

from __future__ import annotations

import contextlib
import datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct, field
from pymongo.errors import DuplicateKeyError

from eventstore.indexes import ensure_collection
from projector import scans
from projector.build import Build
from projector.catalog import STATUS
from projector.checkpoint import CHECKPOINTS, PartitionId, ensure_layout
from projector.declared import from_definition
from projector.errors import ProjectionError
from projector.lease import LEASES
from projector.owned import MARK
from projector.parking import PARKED, build_range
from projector.status import REPORTS
from projector.stream import position_now

if TYPE_CHECKING:
    from collections.abc import Iterable

    from eventstore.client import Database
    from projector.projection import Projection

__all__ = [
    "BUILDS",
    "PROJECTIONS",
    "BuildRecord",
    "Control",
    "build_of",
    "cut_over",
    "drop_build",
    "drop_projection",
    "ensure_build",
    "obsolete",
    "partitions_of",
    "read_builds",
    "read_control",
    "read_controls",
    "set_control",
    "start_rebuild",
]

BUILDS: Final = "projector.builds"
PROJECTIONS: Final = "projector.projections"

_MOST: Final = 10_000


class BuildRecord(Struct, frozen=True, kw_only=True, rename="camel"):
    """A document of `projector.builds`."""

    id: str = field(name="_id")
    projection: str
    version: int
    number: int
    collection: str
    view: str
    definition: dict[str, Any] | None = None
    """The declared form it was begun with, by which any replica can go on with it."""
    created_at: datetime.datetime


class Control(Struct, frozen=True, kw_only=True, rename="camel"):
    """A document of `projector.projections`."""

    name: str = field(name="_id")
    live: str | None = None
    candidate: str | None = None
    previous: str | None = None
    paused: bool = False
    partitions: int = 1
    manual_cutover: bool = False
    """The candidate waits for `projector cutover` when it is ready."""
    cutover: str | None = None
    """The build whose cut-over a person has ordered."""
    failed: str | None = None
    """Why nobody runs it until `projector resume`."""


async def read_controls(database: Database) -> dict[str, Control]:
    """All projections by name."""
    rows = await database[PROJECTIONS].find().limit(_MOST).to_list()
    return {row["_id"]: msgspec.convert(row, Control) for row in rows}


async def read_control(database: Database, name: str) -> Control | None:
    """One projection."""
    row = await database[PROJECTIONS].find_one({"_id": name})
    return None if row is None else msgspec.convert(row, Control)


async def read_builds(database: Database, name: str | None = None) -> dict[str, BuildRecord]:
    """The builds of a projection, or of all, by id."""
    query = {} if name is None else {"projection": name}
    rows = await database[BUILDS].find(query).limit(_MOST).to_list()
    return {row["_id"]: msgspec.convert(row, BuildRecord) for row in rows}


async def set_control(database: Database, name: str, *, where: dict[str, Any] | None = None, **fields: Any) -> bool:
    """Sets fields of a projection's document where `where` holds; False when it did not."""
    result = await database[PROJECTIONS].update_one({"_id": name, **(where or {})}, {"$set": fields})
    return bool(result.matched_count)


def build_of(record: BuildRecord, code: Projection | None) -> Build | None:
    """The build of a record, where its fold is at hand: its declared form, or Python code of the same version."""
    if record.definition is not None:
        try:
            return Build(from_definition(record.definition), record.number)
        except ProjectionError:
            return None  # written by a newer version of ours
    return Build(code, record.number) if code is not None and code.version == record.version else None


async def ensure_build(
    log: Database, database: Database, projection: Projection, partitions: int, *, manual_cutover: bool = False
) -> None:
    """Sees to it that the projection's version has a build, as the candidate when it is new."""
    with contextlib.suppress(DuplicateKeyError):
        control = Control(name=projection.name, partitions=partitions, manual_cutover=manual_cutover)
        await database[PROJECTIONS].insert_one(msgspec.to_builtins(control))
    known = await read_builds(database, projection.name)
    if any(record.version == projection.version for record in known.values()):
        return
    if any(record.version > projection.version for record in known.values()):
        return  # an old replica in a rolling deploy: the newer one has the word
    await _begin(log, database, Build(projection), partitions)


async def start_rebuild(log: Database, database: Database, projection: Projection, partitions: int) -> Build:
    """Begins one more build of a version, as the candidate."""
    known = await read_builds(database, projection.name)
    numbers = [record.number for record in known.values() if record.version == projection.version]
    build = Build(projection, max(numbers, default=0) + 1)
    await _begin(log, database, build, partitions)
    return build


async def _begin(log: Database, database: Database, build: Build, partitions: int) -> None:
    """Token first, then collection and indexes, then the layout that begins with a scan; last the candidate's name."""
    projection = build.projection
    start = await position_now(log)
    for name in (build.collection, build.marks):
        await ensure_collection(database, name)
    if projection.indexes:
        await database[build.collection].create_indexes([index.model() for index in projection.indexes])
    await ensure_layout(database, build.id, partitions, start)
    record = BuildRecord(
        id=build.id,
        projection=projection.name,
        version=projection.version,
        number=build.number,
        collection=build.collection,
        view=projection.collection,
        definition=projection.definition,
        created_at=datetime.datetime.now(datetime.UTC),
    )
    with contextlib.suppress(DuplicateKeyError):
        await database[BUILDS].insert_one(msgspec.to_builtins(record, builtin_types=(datetime.datetime,)))
    await set_control(database, projection.name, where={"live": {"$ne": build.id}}, candidate=build.id)


async def cut_over(database: Database, control: Control, record: BuildRecord) -> bool:
    """Makes a build the one that readers see, by one command on the view; False when another replica changed something."""
    # Its documents without the bookkeeping. The view's pipeline runs on the server, and a filter on it can use indexes.
    pipeline = [{"$unset": MARK}]
    if not await ensure_collection(database, record.view, viewOn=record.collection, pipeline=pipeline):
        await database.command({"collMod": record.view, "viewOn": record.collection, "pipeline": pipeline})
    previous = control.live if control.live != record.id else control.previous
    where = {"live": control.live, "candidate": control.candidate}
    return await set_control(
        database, control.name, where=where, live=record.id, candidate=None, previous=previous, cutover=None
    )


def obsolete(control: Control, records: Iterable[BuildRecord]) -> list[BuildRecord]:
    """The builds of a projection that were overtaken: older than the live one, and not the one before it.

    A younger one that is no candidate may be just about to become it.
    """
    mine = {record.id: record for record in records if record.projection == control.name}
    live = mine.get(control.live or "")
    if live is None:
        return []
    kept = (control.live, control.candidate, control.previous)
    return [record for record in mine.values() if record.id not in kept and record.created_at < live.created_at]


async def drop_build(database: Database, record: BuildRecord) -> None:
    """Removes a build with all that belongs to it: checkpoints first, which fences whoever still runs it."""
    await database[CHECKPOINTS].delete_many({"build": record.id})
    await scans.drop(database, record.id)
    await database.drop_collection(record.collection)
    await database.drop_collection(f"{record.collection}.marks")
    await database[PARKED].delete_many({"_id": build_range(record.id)})
    await database[LEASES].delete_many({"_id": build_range(record.id)})
    await database[REPORTS].delete_many({"_id": build_range(record.id)})
    await database[BUILDS].delete_one({"_id": record.id})


async def drop_projection(database: Database, name: str) -> None:
    """Removes a projection: its view, its builds and its own document."""
    for record in (await read_builds(database, name)).values():
        await database.drop_collection(record.view)
        await drop_build(database, record)
    await database[STATUS].delete_one({"_id": name})
    await database[PROJECTIONS].delete_one({"_id": name})


def partitions_of(build: str, count: int) -> list[PartitionId]:
    """The partitions of a build."""
    return [PartitionId(build, number, count) for number in range(count)]
