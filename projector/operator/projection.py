"""The pass over a `Projection`: its definition goes to MongoDB, its read model gets its indexes, its status comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from projector import catalog
from projector.build import Build
from projector.catalog import DefinitionRecord, Source
from projector.declared import from_definition
from projector.errors import ProjectionError
from projector.operator import ownership
from projector.operator.align import Alignment, Wishes, align
from projector.operator.build import Target
from projector.operator.conditions import State, Verdict
from projector.operator.eventstore import building
from projector.operator.indexes import Index
from projector.operator.kubernetes import SecretUnreadableError
from projector.operator.passes import BadResourceError, Context, Resource
from projector.operator.resource_status import ProjectionStatus
from projector.operator.resources import EventStoreSpec, ProjectionSpec
from projector.operator.statuses import View, view_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from eventstore.client import Database
    from projector.operator.mongo import Mongo
    from projector.projection import Projection

__all__ = ["ProjectionKind", "definition_of"]


def definition_of(name: str, spec: ProjectionSpec) -> dict[str, Any]:
    """The declared form of what a resource says; its indexes' fields in a map, as the declared form has them."""
    indexes = []
    for index in spec.read_model.indexes:
        plain = msgspec.to_builtins(index)
        indexes.append(plain | {"keys": {key.field: key.order for key in index.keys}})
    read_model: dict[str, Any] = {"key": spec.read_model.key, "indexes": indexes}
    if spec.read_model.collection is not None:
        read_model["collection"] = spec.read_model.collection
    return {"name": name, "version": spec.version, "readModel": read_model, "on": spec.on or {}}


class ProjectionKind:
    """See `passes.Kind`."""

    name = "Projection"
    spec = ProjectionSpec
    status = ProjectionStatus

    async def reconcile(
        self,
        context: Context,
        resource: Resource,
        spec: ProjectionSpec,
        before: ProjectionStatus,
        done: Callable[[], None],
    ) -> tuple[ProjectionStatus, Verdict]:
        """The definition first: the read model must not wait for an index."""
        try:
            projection = from_definition(definition_of(resource.name, spec))
        except ProjectionError as error:
            raise BadResourceError("InvalidDefinition", str(error)) from error
        mongo, database = await self.place(context, resource, spec)
        ready_before = {index.name for index in before.indexes if index.state == "Ready"}
        wishes = Wishes(
            owner=resource.owner,
            indexes=[Index.from_document(index.model().document) for index in projection.indexes],
            recreate=spec.allow_recreate,
            drop_unwanted=spec.deletion_policy == "Delete",
            ready_before=ready_before if before.observed_generation == resource.generation else (),
        )
        async with mongo.turn():
            await _publish(mongo.database(database), _record(resource, spec, projection))
            record = await context.statuses.get(mongo, database, resource.name)
            view = view_of(record, context.settings.silence_seconds)
            collection = _collection(projection, view)
            found = await align(
                Target(mongo, database, collection),
                wishes,
                context.builder,
                done,
                lambda action: context.metrics.drift.labels(action).inc(),
            )
        context.metrics.set_builds(
            resource.kind,
            resource.namespace,
            resource.name,
            {name: progress.ratio for name, progress in found.building.items() if progress},
        )
        status = msgspec.structs.replace(
            before,
            indexes=found.indexes,
            foreign_indexes=found.foreign,
            collection=collection,
            version=view.version,
            state=view.state,
            lag_seconds=view.lag_seconds,
            parked=view.parked,
            rebuild_percent=view.rebuild_percent,
        )
        return status, _verdict(spec, found, view, database)

    async def finalize(self, context: Context, resource: Resource, spec: ProjectionSpec) -> None:
        """Ends the projection; with `Delete` the projector drops its read model.

        Raises what pymongo raises, also with `Retain`: a projection must not run on without its resource.
        """
        try:
            mongo, database = await self.place(context, resource, spec)
        except (SecretUnreadableError, BadResourceError):
            return  # its EventStore went first, as when a namespace is deleted
        async with mongo.turn():
            opened = mongo.database(database)
            await catalog.remove_definition(opened, resource.name, resource.uid, drop=spec.deletion_policy == "Delete")
            await ownership.release_all(opened, resource.owner)

    async def view(self, context: Context, resource: Resource) -> View | None:
        """What the projector says now; None when that cannot be told. A cheap look between passes."""
        try:
            spec = msgspec.convert(resource.spec, ProjectionSpec)
            mongo, database = await self.place(context, resource, spec)
            async with mongo.turn():
                record = await context.statuses.get(mongo, database, resource.name)
        except Exception:  # noqa: BLE001 - the next pass will say what is wrong
            return None
        return view_of(record, context.settings.silence_seconds)

    async def place(self, context: Context, resource: Resource, spec: ProjectionSpec) -> tuple[Mongo, str]:
        """The MongoDB and the database of the read model. Raises BadResourceError, SecretUnreadableError."""
        if spec.event_store_ref is None:
            return await context.mongo(resource.namespace, None), context.read_models
        name = spec.event_store_ref.name
        found = context.event_stores(resource.namespace, name)
        if found is None:
            raise BadResourceError("EventStoreNotFound", f"there is no EventStore {resource.namespace}/{name}")
        store = msgspec.convert(found, EventStoreSpec)
        return await context.mongo(resource.namespace, store.connection), store.database


def _collection(projection: Projection, view: View) -> str:
    """The collection behind the spec's version: of the build that is read, else of the one that is to be.

    A version may have been built several times: the second build of `permits.v1` is `permits.v1-2`, in the collection
    of that name (where the read model is called like the projection).
    """
    first = Build(projection)
    for build in (view.live, view.candidate):
        if build is not None and (build == first.id or build.startswith(f"{first.id}-")):
            return f"{first.collection}{build.removeprefix(first.id)}"
    return first.collection


def _record(resource: Resource, spec: ProjectionSpec, projection: Projection) -> DefinitionRecord:
    if projection.definition is None:
        raise AssertionError("a declared projection has a definition")
    return DefinitionRecord(
        name=resource.name,
        definition=projection.definition,
        partitions=spec.partitions,
        paused=spec.paused,
        rebuild={"cutover": spec.rebuild.cutover},
        source=Source(
            kind=resource.kind,
            namespace=resource.namespace,
            name=resource.name,
            uid=resource.uid,
            generation=resource.generation,
        ),
        deletion_policy=spec.deletion_policy,
    )


async def _publish(database: Database, record: DefinitionRecord) -> None:
    """Writes the definition if it differs. Raises BadResourceError when it may not be written."""
    before = await catalog.read_definition(database, record.name)
    if before is not None:
        _check_successor(before, record)
    await catalog.write_definition(database, record, before)


def _check_successor(before: DefinitionRecord, record: DefinitionRecord) -> None:
    if record.source is None or before.source is None or not record.source.same_resource(before.source):
        other = f"{before.source.kind} {before.source.namespace}/{before.source.name}" if before.source else "hand"
        raise BadResourceError("Conflict", f"the projection {record.name} is defined by {other} already")
    if before.deleted:
        raise BadResourceError("Deleting", "the read model of the earlier resource of this name is still being dropped")
    old, new = before.definition, record.definition
    same_version = old.get("version") == new["version"]
    if same_version and _fold(old) != _fold(new):
        raise BadResourceError(
            "VersionUnchanged",
            f"key or fold of version {new['version']} changed: raise spec.version, so that the read model is rebuilt."
            " Until then the earlier definition is in force",
        )


def _fold(definition: dict[str, Any]) -> tuple[Any, Any]:
    """What the content of the read model depends on."""
    return definition.get("readModel", {}).get("key"), definition.get("on")


def _verdict(spec: ProjectionSpec, found: Alignment, view: View, database: str) -> Verdict:
    """First what is wrong, then what goes on, then whether it can be read."""
    degraded = ""
    if view.parked:
        degraded = f"ParkedAggregates: {view.parked} aggregates are set aside, `projector parked list` shows why"
    progressing = building(found)
    if found.problem:
        reason, message = found.problem
        verdict = Verdict("False", reason, message, progressing, f"{reason}: {message}")
    elif progressing:
        verdict = Verdict("False", "BuildingIndexes", progressing.partition(": ")[2], progressing, degraded)
    elif spec.paused:
        verdict = Verdict("False", "Paused", "spec.paused is true", degraded=degraded)
    else:
        verdict = _projector_verdict(spec, view, database, degraded)
    return verdict


def _projector_verdict(spec: ProjectionSpec, view: View, database: str, degraded: str) -> Verdict:
    """What the projector's own word means."""
    if view.silent:
        message = f"no projector reports on it (`projector run --from-database` on the database {database})"
        return Verdict("Unknown", "ProjectorSilent", message, degraded=degraded)
    if view.state in {"failed", "stopped"}:
        message = view.error or f"the projector says: {view.state}"
        return Verdict("False", "ProjectionFailed", message, degraded=f"ProjectionFailed: {message}")
    if view.version != spec.version or view.state == "rebuilding":
        percent = f" ({view.rebuild_percent} %)" if view.rebuild_percent is not None else ""
        serving = f"version {view.version} is read meanwhile" if view.version else "nothing is read meanwhile"
        message = f"version {spec.version} is being built{percent}, {serving}"
        state: State = "True" if view.version else "False"
        return Verdict(state, "Rebuilding", message, f"Rebuilding: {message}", degraded)
    if view.error and not degraded:
        degraded = f"ProjectorReports: {view.error}"
    progressing = "" if view.state == "live" else f"NotLive: the projector says: {view.state}"
    return Verdict("True", "Live", f"version {view.version} is live", progressing, degraded)
