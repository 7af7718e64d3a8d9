"""How things stand, put together from what is defined, what was ordered, and what the projectors report."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from projector.builds import partitions_of, read_builds, read_controls
from projector.catalog import DEFINITIONS, StatusRecord, read_statuses
from projector.parking import PARKED, build_range
from projector.status import REPORTS, STALE_SECONDS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eventstore.client import Database
    from projector.builds import BuildRecord, Control
    from projector.parking import Parked

__all__ = ["BuildInfo", "Detail", "Overview", "ParkedInfo", "ParkedPage", "PartitionInfo", "Summary"]

NOT_RUNNING: Final = "not_running"
"""No projector has reported on it lately."""

_MOST: Final = 10_000


class Summary(Struct, frozen=True, kw_only=True, rename="camel"):
    """A projection in a line."""

    name: str
    version: int | None
    """The version that readers see; None before the first cut-over."""
    state: str
    """A health state of `projector.metrics`, or `not_running`."""
    lag_seconds: float | None
    """0 when caught up; None when nobody reports."""
    backlog_events: int | None
    parked: int | None
    """Aggregates that are set aside."""
    rebuild: dict[str, Any] | None
    """`percent` and `eta` while a build is being filled."""
    partitions: int
    live: str | None
    candidate: str | None
    previous: str | None
    error: str | None
    updated_at: datetime.datetime | None


class BuildInfo(Struct, frozen=True, kw_only=True, rename="camel"):
    """A build of a projection."""

    id: str
    version: int
    role: str
    """`live`, `candidate`, `previous`, or `old`: about to be dropped."""
    collection: str
    documents: int
    """An estimate, by MongoDB's own count."""
    parked: int
    declared: bool
    created_at: datetime.datetime


class PartitionInfo(Struct, frozen=True, kw_only=True, rename="camel"):
    """A partition of a build, as its owner reported it last."""

    build: str
    partition: int
    owner: str | None
    state: str
    lag_seconds: float | None
    reported_at: datetime.datetime | None
    error: str | None


class Detail(Summary, frozen=True, kw_only=True, rename="camel"):
    """Everything about a projection."""

    view: str | None
    paused: bool
    manual_cutover: bool
    defined_by: str | None
    """The resource, or the collection of definitions, that says how it is run; None: the projector's own folder or code."""
    builds: list[BuildInfo]
    partition_owners: list[PartitionInfo]


class ParkedInfo(Struct, frozen=True, kw_only=True, rename="camel"):
    """An aggregate that was set aside: at which event, and why."""

    build: str
    aggregate_id: str
    sequence_no: int
    event_id: str | None
    event_name: str | None
    category: str
    """`fold`, `write`, `gap` or `reset`."""
    reason: str
    attempts: int
    state: str
    """`retrying`, or `parked`: it waits for a person."""
    since: datetime.datetime
    due: datetime.datetime
    """When it is tried again, while it is retrying."""

    @classmethod
    def of(cls, record: Parked) -> ParkedInfo:
        """From the record."""
        return cls(**{name: getattr(record, name) for name in cls.__struct_fields__})


class ParkedPage(Struct, frozen=True, kw_only=True, rename="camel"):
    """Some of them, in a fixed order."""

    parked: list[ParkedInfo]
    next: str | None = None
    """What to give as `after` for the next page; None: there is none."""


class Overview:
    """What MongoDB said at one moment; all projections, or one."""

    def __init__(
        self,
        database: Database,
        controls: Mapping[str, Control],
        statuses: Mapping[str, StatusRecord],
        definitions: Mapping[str, dict[str, Any]],
        records: Mapping[str, BuildRecord],
    ) -> None:
        self._database = database
        self._records = records
        self._controls = controls
        self._statuses = statuses
        self._definitions = definitions
        self.names = sorted({*controls, *statuses, *definitions})
        """The projections that anything is known of."""

    @classmethod
    async def read(cls, database: Database) -> Overview:
        """Reads it."""
        # As they lie there, since one that is no definition must not hide the others.
        rows = await database[DEFINITIONS].find({}, {"source": 1, "deleted": 1}).limit(_MOST).to_list()
        return cls(
            database,
            await read_controls(database),
            await read_statuses(database),
            {row["_id"]: row for row in rows},
            await read_builds(database),
        )

    def summaries(self) -> list[Summary]:
        """All of them, by name."""
        return [self.summary(name) for name in self.names]

    def summary(self, name: str) -> Summary:
        """One of them."""
        return Summary(**self._fields(name))

    def _fields(self, name: str) -> dict[str, Any]:
        control = self._controls.get(name)
        status = self._statuses.get(name, StatusRecord(name=name))
        fresh = is_fresh(status.updated_at)
        live = self._records.get((control.live if control else None) or "")
        if control is not None and control.failed:
            state = "failed"
        elif control is not None and control.paused:
            state = "paused"
        elif status.state in {"paused", "failed"} and control is not None and not status.error:
            state = "waiting"  # it was resumed, and nobody has taken it up yet
        else:
            state = status.state if fresh else NOT_RUNNING
        return {
            "name": name,
            "version": live.version if live else None,
            "state": state,
            "lag_seconds": status.lag_seconds if fresh else None,
            "backlog_events": status.backlog_events if fresh else None,
            "parked": status.parked,
            "rebuild": status.rebuild if fresh else None,
            "partitions": control.partitions if control else 1,
            "live": control.live if control else None,
            "candidate": control.candidate if control else None,
            "previous": control.previous if control else None,
            "error": (control.failed if control else None) or status.error,
            "updated_at": status.updated_at,
        }

    async def detail(self, name: str) -> Detail:
        """Everything about one of them."""
        control = self._controls.get(name)
        records = [record for record in self._records.values() if record.projection == name]
        known = [await self._build(record, control) for record in records]
        owners = []
        for build in (control.live, control.candidate) if control else ():
            if build is not None and control is not None:
                owners += await self._partitions(build, control.partitions)
        definition = self._definitions.get(name)
        return Detail(
            **self._fields(name),
            view=next((record.view for record in records), None),
            paused=control.paused if control else False,
            manual_cutover=control.manual_cutover if control else False,
            defined_by=None if definition is None else _origin(definition),
            builds=sorted(known, key=lambda build: build.created_at),
            partition_owners=owners,
        )

    async def _build(self, record: BuildRecord, control: Control | None) -> BuildInfo:
        roles = {control.previous: "previous", control.candidate: "candidate", control.live: "live"} if control else {}
        return BuildInfo(
            id=record.id,
            version=record.version,
            role=roles.get(record.id, "old"),
            collection=record.collection,
            documents=await self._database[record.collection].estimated_document_count(),
            parked=await self._database[PARKED].count_documents({"_id": build_range(record.id)}),
            declared=record.definition is not None,
            created_at=record.created_at,
        )

    async def _partitions(self, build: str, count: int) -> list[PartitionInfo]:
        found = self._database[REPORTS].find({"_id": build_range(build), "partitions": count})
        reports = {report["_id"]: report async for report in found}
        infos = []
        for partition in partitions_of(build, count):
            report = reports.get(str(partition), {})
            fresh = is_fresh(report.get("at"))
            infos.append(
                PartitionInfo(
                    build=build,
                    partition=partition.number,
                    owner=report.get("owner") if fresh else None,
                    state=report.get("state", NOT_RUNNING) if fresh else NOT_RUNNING,
                    lag_seconds=report.get("lagSeconds") if fresh else None,
                    reported_at=report.get("at"),
                    error=report.get("error") if fresh else None,
                )
            )
        return infos


def is_fresh(at: datetime.datetime | None) -> bool:
    """Whether a report of that time still counts."""
    return at is not None and (datetime.datetime.now(datetime.UTC) - at).total_seconds() < STALE_SECONDS


def _origin(definition: dict[str, Any]) -> str:
    source = definition.get("source")
    return f"{source.get('kind')} {source.get('namespace')}/{source.get('name')}" if source else DEFINITIONS
