"""Whether a build has applied what the log holds of an aggregate: its mark, and what lies beyond it.

Events that change no document move the mark in memory alone, so a mark may stay behind the head for good reason: trailing
events without an effect count as applied. Per aggregate, sequence order is commit order, so a mark says everything below it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from eventstore import log as event_log
from projector.owned import MARK

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from eventstore.client import Database
    from projector.builds import BuildRecord
    from projector.projection import Event, Projection

__all__ = ["changes_nothing", "first_pending", "marks_of_aggregates"]

PAGE: Final = 1_000


async def marks_of_aggregates(
    database: Database, record: BuildRecord, aggregate_ids: Collection[str]
) -> dict[str, int]:
    """The marks of these aggregates, in documents or beside them; 0 where there is none."""
    found = dict.fromkeys(aggregate_ids, 0)
    wanted = {"_id": {"$in": list(aggregate_ids)}}
    for collection, field in ((record.collection, MARK), (f"{record.collection}.marks", "mark")):
        async for row in database[collection].find(wanted, {field: 1}):
            found[row["_id"]] = max(found[row["_id"]], int(row.get(field, 0)))
    return found


def changes_nothing(projection: Projection, event: Event) -> bool:
    """Whether an event has no handler or goes to no document."""
    if not projection.handles(event["eventName"]):
        return True
    if projection.aggregate_keyed:
        return False
    try:
        return not projection.keys(event)
    except Exception:  # noqa: BLE001 - a key function may raise anything; the event then fails where it is applied
        return False


async def first_pending(
    log: Database, projection: Projection, marks: Mapping[str, int], heads: Mapping[str, int]
) -> dict[str, int]:
    """For each aggregate the first event above its mark that changes a document, or that the log lacks.

    `heads` says up to which number is looked; an aggregate without such an event is left out.
    """
    pending: dict[str, int] = {}
    at = {name: mark for name, mark in marks.items() if mark < heads[name]}
    while at:
        events = await event_log.events_after(log, at, limit=PAGE)
        for event in events:
            name, number = event["aggregateId"], int(event["sequenceNo"])
            if name in pending or at[name] >= heads[name]:
                continue
            if number != at[name] + 1:
                pending[name] = at[name] + 1
            elif changes_nothing(projection, dict(event)):
                at[name] = number
            else:
                pending[name] = number
        whole = len(events) < PAGE
        last = events[-1]["aggregateId"] if events else ""
        for name in list(at):
            if name in pending or at[name] >= heads[name]:
                del at[name]
            elif whole or name < last:
                pending[name] = at[name] + 1
                del at[name]
    return pending
