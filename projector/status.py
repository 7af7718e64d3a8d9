"""How far everything is: what a replica reports of its partitions, and what is put together from the reports of all.

A report is a document per partition in `projector.reports`, written by its owner every tick; `projector.status` has the sum per
projection, which the operator and the commands read.
"""

from __future__ import annotations

import datetime
import time
from typing import TYPE_CHECKING, Any, Final

import structlog
from pymongo import UpdateOne
from pymongo.errors import OperationFailure

from eventstore import tasks
from projector.catalog import STATUS
from projector.parking import PARKED, build_range
from projector.scans import progress_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from eventstore.client import Database
    from projector.build import Build
    from projector.builds import Control
    from projector.metrics import Metrics
    from projector.partition import Partition
    from projector.progress import Progress

__all__ = ["REPORTS", "Reports", "oplog_start"]

REPORTS: Final = "projector.reports"

STALE_SECONDS: Final = 30.0
"""A report older than this is nobody's word any more."""

_AGE: Final = {"$dateDiff": {"startDate": "$at", "endDate": "$$NOW", "unit": "second"}}
_FRESH: Final = {"$expr": {"$lt": [_AGE, STALE_SECONDS]}}

CLOSE_SECONDS: Final = 2.0
"""How far behind the writers a build may be to take over. Positions have whole seconds, so that less than 2 could never be met."""

OPLOG_SECONDS: Final = 15.0

_CAPPED_POSITION_LOST: Final = 136

_log = structlog.stdlib.get_logger(__name__)


class Reports:
    """Writes the reports of this replica and the status of what it runs; sets the gauges."""

    def __init__(self, log: Database, database: Database, metrics: Metrics, owner: str) -> None:
        self._event_log = log
        self._database = database
        self._metrics = metrics
        self._owner = owner
        self._oplog_asked = 0.0
        self._oplog_start: float | None = None
        self._counted: dict[str, int] = {}

    async def caught_up(self, build: Build, partitions: int) -> bool:
        """Whether all partitions of a build have said, lately, that they are current: while writers write all the time, none is
        ever without an event on its way, so those that keep close behind them are too."""
        close = {"state": "live", "lagSeconds": {"$lt": CLOSE_SECONDS}}
        current = {"$or": [{"caughtUp": True}, close]}
        query = {"_id": build_range(build.id), "partitions": partitions, **current, **_FRESH}
        return await self._database[REPORTS].count_documents(query) >= partitions

    async def write(
        self,
        running: Mapping[str, Any],
        controls: Mapping[str, Control],
        runnable: Mapping[str, tuple[Build, Control]],
        peers: Mapping[str, Any],
        problems: Mapping[str, str],
    ) -> None:
        """Reports of the partitions that run here, then the status of the projections of this replica.

        `problems` says in words why a projection does not run as its definition has it.
        """
        self._metrics.replicas.set(len(peers))
        await self._ask_oplog()
        # Not of what is just being ended, whose build may have been dropped with its reports.
        current = {name: item for name, item in running.items() if item.build.id in runnable}
        if current:
            await self._database[REPORTS].bulk_write(
                [
                    # The time is the server's, so that the clocks of two replicas are never compared.
                    UpdateOne(
                        {"_id": name}, {"$set": self._report(item.partition), "$currentDate": {"at": True}}, upsert=True
                    )
                    for name, item in current.items()
                ],
                ordered=False,
            )
        run_here = {item.build.projection.name for item in running.values()}
        await tasks.together(
            self._write_status(control, runnable, problems.get(name))
            for name, control in controls.items()
            if name in run_here or control.paused or control.failed
        )
        for name in problems.keys() - {
            control.name for control in controls.values() if control.live or control.candidate
        }:
            status = {"state": "failed", "error": problems[name], "updatedAt": datetime.datetime.now(datetime.UTC)}
            await self._database[STATUS].update_one({"_id": name}, {"$set": status}, upsert=True)

    def _report(self, partition: Partition) -> dict[str, Any]:
        progress = partition.progress
        return {
            "owner": self._owner,
            "partitions": partition.id.count,
            "number": partition.id.number,
            "state": progress.state,
            "caughtUp": progress.caught_up,
            "lagSeconds": round(progress.lag_seconds(), 3),
            "clusterTime": progress.position.cluster_time if progress.position else None,
            "backlogEvents": progress.backlog_events(),
            "error": progress.error,
        }

    async def _ask_oplog(self) -> None:
        """Age of the oldest oplog entry; no metric where the role may not read it."""
        now = time.monotonic()
        if now - self._oplog_asked >= OPLOG_SECONDS or not self._oplog_asked:
            self._oplog_asked = now
            self._oplog_start = await oplog_start(self._event_log)

    def show(self, running: Mapping[str, Any], controls: Mapping[str, Control]) -> None:
        """Sets the gauges, from memory alone: while MongoDB is away or refuses something they must not stay as they were."""
        self._metrics.set_oplog_window(None if self._oplog_start is None else time.time() - self._oplog_start)
        for name, control in controls.items():
            partitions = [item.partition for item in running.values() if item.build.projection.name == name]
            self._set_gauges(name, control, partitions)

    def _set_gauges(self, name: str, control: Control, mine: list[Partition]) -> None:
        self._metrics.partitions.labels(name).set(len(mine))
        if control.failed:
            self._metrics.set_health(name, "failed")
        elif control.paused:
            self._metrics.set_health(name, "paused")
        elif not mine:
            self._metrics.set_health(name, "standby")
        else:
            states = [partition.progress.state for partition in _read(mine, control)]
            worst = ("waiting", "repairing", "rebuilding", "catching_up", "live")
            self._metrics.set_health(name, next((state for state in worst if state in states), states[0]))
        self._measure(name, [each.progress for each in mine], [each.progress for each in _read(mine, control)])

    def _measure(self, name: str, progress: list[Progress], read: list[Progress]) -> None:
        """The gauges of a projection, over the partitions that run here; all 0 without any, so that none stays as it was.

        `read`: those of the build that readers see. One that is being built beside it is behind by nature.
        """
        metrics, now = self._metrics, time.time()
        metrics.lag_seconds.labels(name).set(max((item.lag_seconds() for item in read), default=0))
        metrics.backlog_events.labels(name).set(sum(item.backlog_events() for item in read))
        times = [item.checkpoint.cluster_time.time for item in progress if item.checkpoint is not None]
        metrics.token_age.labels(name).set(max(0.0, now - min(times)) if times else 0)
        records = [record for item in read for record in item.aside.values()]
        for state in ("retrying", "parked"):
            metrics.parked.labels(name, state).set(sum(record.state == state for record in records))
        metrics.parked_oldest.labels(name).set(min((record.since.timestamp() for record in records), default=0))
        if progress:
            metrics.heartbeat.labels(name).set(min(item.heartbeat for item in progress))

    async def _write_status(
        self, control: Control, runnable: Mapping[str, tuple[Build, Control]], problem: str | None
    ) -> None:
        """The sum of all reports of a projection; every replica that runs a part writes the same."""
        shown = control.live or control.candidate
        if shown is None:
            return
        query = {"_id": build_range(shown), "partitions": control.partitions, **_FRESH}
        reports = await self._database[REPORTS].find(query).to_list(1_000)
        states = [report["state"] for report in reports]
        worst = ("waiting", "repairing", "rebuilding", "catching_up", "live")
        state = next((known for known in worst if known in states), "waiting")
        if len(reports) < control.partitions and state == "live":
            state = "waiting"
        state = "failed" if control.failed else "paused" if control.paused else state
        parked = await self._database[PARKED].count_documents({"_id": build_range(shown)})
        build = runnable.get(shown)
        status = {
            "version": build[0].projection.version if build and control.live else None,
            "state": state,
            "live": control.live,
            "candidate": control.candidate,
            "previous": control.previous,
            "lagSeconds": max((report["lagSeconds"] for report in reports), default=None),
            "backlogEvents": sum(report["backlogEvents"] for report in reports) if reports else None,
            "parked": parked,
            "rebuild": await self._rebuild(control),
            "partitions": [
                {
                    "partition": report["number"],
                    "owner": report["owner"],
                    "state": report["state"],
                    "lagSeconds": report["lagSeconds"],
                }
                for report in sorted(reports, key=lambda report: report["number"])
            ],
            "error": control.failed
            or problem
            or next((report["error"] for report in reports if report["error"]), None),
            "updatedAt": datetime.datetime.now(datetime.UTC),
        }
        await self._database[STATUS].update_one({"_id": control.name}, {"$set": status}, upsert=True)

    async def _rebuild(self, control: Control) -> dict[str, Any] | None:
        """How far the build is that is to take over; None when there is none. A build that only comes back has no scan."""
        if control.candidate is None:
            return None
        found = await progress_of(self._database, control.candidate)
        if found is None:
            return {"build": control.candidate, "percent": None, "eta": None}
        return {
            "build": control.candidate,
            "percent": round(100 * found.ratio, 1),
            "eta": found.eta,
            "events": found.events,
            "total": found.total,
        }


def _read(partitions: list[Partition], control: Control) -> list[Partition]:
    """The partitions of the build that readers see; all where none of it runs here."""
    return [partition for partition in partitions if partition.id.build == control.live] or partitions


async def oplog_start(database: Database) -> float | None:
    """Commit time of the oldest oplog entry, seconds since the epoch; None where the role may not read it."""
    for _ in range(10):
        try:
            first = await database.client["local"]["oplog.rs"].find_one({}, {"ts": 1}, sort=[("$natural", 1)])
        except OperationFailure as error:
            if error.code == _CAPPED_POSITION_LOST:  # it was cut off in this moment
                continue
            return None
        return float(first["ts"].time) if first else None
    return None
