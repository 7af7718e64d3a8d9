"""The pass over an `EventStore`: the log's collection, its validator, its unique index, and the extra indexes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
from pymongo.errors import OperationFailure, PyMongoError

from eventstore.event import EVENTS
from eventstore.indexes import AGGREGATE_SEQUENCE, VALIDATOR
from projector.operator import measure, ownership
from projector.operator.align import Alignment, Wishes, align, drop_ours
from projector.operator.build import Target
from projector.operator.conditions import Verdict
from projector.operator.indexes import Index
from projector.operator.kubernetes import SecretUnreadableError
from projector.operator.mongo import MongoAwayError
from projector.operator.passes import BadResourceError, Context, Resource
from projector.operator.resource_status import EventStoreStatus
from projector.operator.resources import EventStoreSpec, LogIndex

if TYPE_CHECKING:
    from collections.abc import Callable

    from eventstore.client import Database

__all__ = ["EventStoreKind", "building", "index_of"]

_SEQUENCE: Final = Index.from_document(AGGREGATE_SEQUENCE.document)
_NAMESPACE_EXISTS: Final = 48


def index_of(model: LogIndex) -> Index:
    """The index that a resource declares."""
    collation = None if model.collation is None else msgspec.to_builtins(model.collation)
    return Index(
        name=model.name,
        keys=tuple((key.field, key.order) for key in model.keys),
        sparse=model.sparse,
        hidden=model.hidden,
        partial_filter=model.partial_filter,
        collation=collation,
    )


class EventStoreKind:
    """See `passes.Kind`."""

    name = "EventStore"
    spec = EventStoreSpec
    status = EventStoreStatus

    async def reconcile(
        self,
        context: Context,
        resource: Resource,
        spec: EventStoreSpec,
        before: EventStoreStatus,
        done: Callable[[], None],
    ) -> tuple[EventStoreStatus, Verdict]:
        """Collection and validator first, then the indexes."""
        mongo = await context.mongo(resource.namespace, spec.connection)
        ready_before = {index.name for index in before.indexes if index.state == "Ready"}
        wishes = Wishes(
            owner=resource.owner,
            indexes=[_SEQUENCE, *(index_of(index) for index in spec.indexes)],
            recreate=spec.allow_recreate,
            drop_unwanted=spec.deletion_policy == "Delete",
            keep={_SEQUENCE.name},
            ready_before=ready_before if before.observed_generation == resource.generation else (),
        )

        def drift(action: str) -> None:
            context.metrics.drift.labels(action).inc()

        async with mongo.turn():
            if await _ensure_collection(mongo.database(spec.database), validator=spec.validator) and ready_before:
                drift("validator")
            found = await align(Target(mongo, spec.database, EVENTS), wishes, context.builder, done, drift)
        context.metrics.set_builds(
            resource.kind,
            resource.namespace,
            resource.name,
            {name: progress.ratio for name, progress in found.building.items() if progress},
        )
        status = msgspec.structs.replace(
            before, indexes=found.indexes, index_summary=found.summary, foreign_indexes=found.foreign
        )
        return status, _verdict(found)

    async def finalize(self, context: Context, resource: Resource, spec: EventStoreSpec) -> None:
        """Gives up the claims; with `Delete` drops the extra indexes that were made. The log stays in any case.

        Raises what pymongo raises only with `Delete`: with `Retain` nothing is worth holding up a deletion.
        """
        drop = spec.deletion_policy == "Delete"
        try:
            mongo = await context.mongo(resource.namespace, spec.connection)
            async with mongo.turn():
                if drop:
                    await drop_ours(Target(mongo, spec.database, EVENTS), resource.owner, keep={_SEQUENCE.name})
                await ownership.release_all(mongo.database(spec.database), resource.owner)
        except (SecretUnreadableError, BadResourceError):
            return  # gone before the resource, as when a namespace is deleted: nothing can be done any more
        except (PyMongoError, MongoAwayError):
            if drop:
                raise


def _verdict(found: Alignment) -> Verdict:
    progressing = building(found)
    if found.problem:
        reason, message = found.problem
        return Verdict("False", reason, message, progressing=progressing, degraded=f"{reason}: {message}")
    if progressing:
        return Verdict("False", "BuildingIndexes", progressing.partition(": ")[2], progressing=progressing)
    return Verdict("True", "Reconciled", f"{found.summary} indexes")


def building(found: Alignment) -> str:
    """Reason and message of the builds that run; coarse, the metric has the numbers."""
    if not found.building:
        return ""
    return f"BuildingIndexes: {', '.join(sorted(found.building))}"


async def _ensure_collection(database: Database, *, validator: bool) -> bool:
    """Makes the collection, or gives it the validator back; True when that was needed."""
    options = await measure.collection_options(database, EVENTS)
    if options is None:
        try:
            options = {"validator": VALIDATOR} if validator else {}
            await database.command("create", EVENTS, writeConcern={"w": "majority"}, **options)
        except OperationFailure as error:
            if error.code != _NAMESPACE_EXISTS:
                raise
        return True
    if validator and options.get("validator") != VALIDATOR:
        await database.command("collMod", EVENTS, validator=VALIDATOR, writeConcern={"w": "majority"})
        return True
    return False
