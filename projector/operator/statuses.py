"""The statuses that projectors write, read for all Projections at once instead of once for each."""

from __future__ import annotations

import asyncio
import datetime
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from pymongo.errors import PyMongoError

from projector import catalog

if TYPE_CHECKING:
    from projector.catalog import StatusRecord
    from projector.operator.mongo import Mongo

__all__ = ["Statuses", "View", "coarse", "view_of"]

_FORGET: Final = 600.0
"""So long a database that no Projection asks about is remembered."""

_STEPS: Final = (1, 5, 15, 60, 300, 900, 3_600, 21_600, 86_400)
"""Lags that are told apart. Each crossing of a step is a write to the API server, so they are few."""


class View(NamedTuple):
    """What of a projector's status goes into the resource's: coarse, so that the API server is not written to for ever.
    Prometheus has the exact numbers."""

    state: str | None = None
    version: int | None = None
    lag_seconds: int | None = None
    parked: int | None = None
    rebuild_percent: int | None = None
    error: str | None = None
    live: str | None = None
    candidate: str | None = None
    silent: bool = True
    """Nobody reports on the projection, or nobody any more."""


def coarse(seconds: float) -> int:
    """A lag as the last step that it has reached; 0 below a second."""
    return max((step for step in _STEPS if seconds >= step), default=0)


def view_of(record: StatusRecord | None, silence_seconds: float, now: datetime.datetime | None = None) -> View:
    """The coarse view of a status; one that is older than `silence_seconds` is silent, and says nothing of the lag."""
    if record is None:
        return View()
    age = (
        ((now or datetime.datetime.now(datetime.UTC)) - record.updated_at).total_seconds() if record.updated_at else 0.0
    )
    silent = age > silence_seconds
    percent = (record.rebuild or {}).get("percent")
    return View(
        state=record.state,
        version=record.version,
        lag_seconds=None if silent or record.lag_seconds is None else coarse(record.lag_seconds),
        parked=record.parked,
        rebuild_percent=int(percent) // 10 * 10 if isinstance(percent, int | float) else None,
        error=record.error,
        live=record.live,
        candidate=record.candidate,
        silent=silent,
    )


class Statuses:
    """Reads `projector.status` of each database at most once in `fresh_seconds`."""

    def __init__(self, fresh_seconds: float) -> None:
        self._fresh_seconds = fresh_seconds
        self._kept: dict[tuple[int, str], tuple[float, dict[str, StatusRecord] | PyMongoError]] = {}
        self._reading = asyncio.Lock()

    async def get(self, mongo: Mongo, database: str, name: str) -> StatusRecord | None:
        """The status of a projection as it was at most `fresh_seconds` ago. Raises what pymongo raised then."""
        key = id(mongo), database
        async with self._reading:
            kept = self._kept.get(key)
            if kept is None or time.monotonic() - kept[0] > self._fresh_seconds:
                read: dict[str, StatusRecord] | PyMongoError
                try:
                    read = await catalog.read_statuses(mongo.database(database))
                except PyMongoError as error:
                    read = error  # hundreds that wait for this must not all ask in vain
                kept = time.monotonic(), read
                self._kept = {other: value for other, value in self._kept.items() if value[0] > kept[0] - _FORGET}
                self._kept[key] = kept
        if isinstance(kept[1], PyMongoError):
            raise kept[1]
        return kept[1].get(name)
