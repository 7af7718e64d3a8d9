"""Projections as `projector.definitions` says: what `projector run --from-database` runs.

Read every tick, so that a change, a pause, a new version or a removal takes effect without a restart. Each definition is taken
by itself: one that is wrong is named in `problems`, and its projection goes on as it was built last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import bson
import msgspec
import structlog

from projector.builds import drop_projection, read_builds
from projector.catalog import DEFINITIONS, DefinitionRecord
from projector.declared import from_definition
from projector.errors import ProjectionError
from projector.lease import REPLICAS
from projector.wanted import Wanted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eventstore.client import Database
    from projector.projection import Projection

__all__ = ["DatabaseCatalog"]

_MOST: Final = 10_000

_log = structlog.stdlib.get_logger(__name__)


class DatabaseCatalog:
    """See the module; a `projector.supervisor.Catalog`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._compiled: dict[str, tuple[bytes, Projection | ProjectionError]] = {}
        self.problems: dict[str, str] = {}

    async def wanted(self) -> Sequence[Wanted]:
        """All that shall run now. Also drops what was marked for it, once nobody runs it any more."""
        rows = await self._database[DEFINITIONS].find().sort("_id", 1).limit(_MOST).to_list()
        self._compiled = {row["_id"]: self._compiled[row["_id"]] for row in rows if row["_id"] in self._compiled}
        problems: dict[str, str] = {}
        wanted: dict[str, Wanted] = {}
        for row in rows:
            try:
                record = msgspec.convert(row, DefinitionRecord)
            except msgspec.ValidationError as error:
                problems[str(row["_id"])] = f"its document in {DEFINITIONS} cannot be read: {error}"
                continue
            if record.deleted:
                await self._remove(record)
                continue
            try:
                projection = self._projection(record)
            except ProjectionError as error:
                problems[record.name] = str(error)
                found = await self._as_built(record.name)
                if found is None:
                    continue
                projection = found
            wanted[record.name] = Wanted(
                projection,
                partitions=record.partitions,
                paused=record.paused,
                manual_cutover=record.rebuild.get("cutover") == "Manual",
            )
        await self._part(wanted, problems)
        self.problems = problems
        return list(wanted.values())

    def _projection(self, record: DefinitionRecord) -> Projection:
        """The compiled definition, from memory while it is the same. Raises ProjectionError."""
        content = bson.encode(record.definition)
        known = self._compiled.get(record.name)
        if known is None or known[0] != content:
            compiled: Projection | ProjectionError
            try:
                compiled = from_definition(record.definition)
                if compiled.name != record.name:
                    compiled = ProjectionError(f"the definition's name is {compiled.name!r}, not {record.name!r}")
            except ProjectionError as error:
                compiled = error
            known = self._compiled[record.name] = content, compiled
        if isinstance(known[1], ProjectionError):
            raise known[1]
        return known[1]

    async def _as_built(self, name: str) -> Projection | None:
        """The projection as its newest build has it."""
        records = sorted((await read_builds(self._database, name)).values(), key=lambda record: record.created_at)
        for record in reversed(records):
            if record.definition is not None:
                try:
                    return from_definition(record.definition)
                except ProjectionError:
                    continue
        return None

    async def _part(self, wanted: dict[str, Wanted], problems: dict[str, str]) -> None:
        """Takes out those whose read model belongs to another projection: the first that was built has it."""
        by_collection: dict[str, list[str]] = {}
        for name, item in wanted.items():
            by_collection.setdefault(item.projection.collection, []).append(name)
        for collection, names in by_collection.items():
            if len(names) == 1:
                continue
            builds = (await read_builds(self._database)).values()
            first = min(
                (record for record in builds if record.view == collection and record.projection in names),
                key=lambda record: record.created_at,
                default=None,
            )
            owner = first.projection if first is not None else names[0]
            for name in names:
                if name != owner:
                    problems[name] = f"its read model {collection!r} is that of the projection {owner!r}"
                    del wanted[name]

    async def _remove(self, record: DefinitionRecord) -> None:
        """Drops the read model, then the definition; later, while some replica may still be running it."""
        if record.deletion_policy == "Delete":
            builds = set(await read_builds(self._database, record.name))
            async for replica in self._database[REPLICAS].find({}, {"builds": 1}):
                if builds.intersection(replica["builds"]):
                    return
            await drop_projection(self._database, record.name)
            _log.info("projection_dropped", projection=record.name)
        same: dict[str, Any] = {"_id": record.name, "deleted": True, "updatedAt": record.updated_at}
        await self._database[DEFINITIONS].delete_one(same)
