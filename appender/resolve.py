"""What became of requests whose events may be in the log already: repeats, lost answers, failed expectations.

A request is judged by what a majority has: the heads are read first and the eventIds after them, so that an event found
missing is none of those that the head counts. A repeat wins over its expectation: the original numbers are its answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from appender.encoding import same
from appender.problems import EventIdConflict, OutcomeUnknown, Problem, SequenceConflict, Unavailable
from eventstore import log

if TYPE_CHECKING:
    from collections.abc import Sequence

    from appender.encoding import Append, Event
    from appender.lanes import Request
    from eventstore.client import Database

__all__ = ["judge", "too_late"]


async def judge(database: Database, requests: Sequence[Request], heads: dict[str, int], now: float) -> list[Request]:
    """Gives those of `requests` an outcome that need no write any more, and returns them; the others may be written.

    `requests` are all that stand in front of their lanes, in order. `heads` receives what was read. Raises what pymongo
    raises.
    """
    wanted = list({append.aggregate_id for request in requests for append in request.appends})
    found = await log.heads(database, wanted)
    if any(
        append.expected is not None and append.expected > found.get(append.aggregate_id, 0)
        for request in requests
        for append in request.appends
    ):
        await log.fence(database)  # the caller knows more than we read: make sure that it was not the past
        found = await log.heads(database, wanted)
    heads.update({aggregate_id: found.get(aggregate_id, 0) for aggregate_id in wanted})
    stored = await _find(database, requests)
    judged = []
    behind: set[str] = set()
    for request in requests:
        _judge_one(request, stored, heads, behind, now)
        if request.problem is not None or request.replayed:
            judged.append(request)
        else:
            request.look_up = False
            behind.update(append.aggregate_id for append in request.appends)
    return judged


async def _find(database: Database, requests: Sequence[Request]) -> dict[str, tuple[int, set[int]]]:
    """By eventId: its sequenceNo, and the requests (by `id`) of which it is the same event."""
    asking: dict[str, list[tuple[Request, Append, Event]]] = {}
    for request in requests:
        for append in request.appends:
            for event in append.events:
                if event.given_id or request.uncertain:
                    asking.setdefault(event.event_id, []).append((request, append, event))
    stored: dict[str, tuple[int, set[int]]] = {}
    if asking:
        # One by one: what is there under these ids may be larger than what was sent.
        async for there in log.find_by_id(database, list(asking)):
            equal = {
                id(request)
                for request, append, event in asking[there["_id"]]
                if same(event, append.aggregate_id, there)
            }
            stored[there["_id"]] = (int(there["sequenceNo"]), equal)
    return stored


def _judge_one(
    request: Request,
    stored: dict[str, tuple[int, set[int]]],
    heads: dict[str, int],
    behind: set[str],
    now: float,
) -> None:
    """Sets the outcome of one request if it has one. `behind`: aggregates with a request in front that has none."""
    ids = request.event_ids()
    there = [event_id for event_id in ids if event_id in stored]
    if there:
        other = [event_id for event_id in there if id(request) not in stored[event_id][1]]
        if other or len(there) < len(ids):
            request.problem = _id_conflict(other, there, len(ids))
            return
        for append in request.appends:
            append.numbers = [stored[event.event_id][0] for event in append.events]
        request.replayed = True
        return
    if now >= request.deadline:
        request.problem = too_late(request)
        return
    for append in request.appends:
        head = heads[append.aggregate_id]
        # Heads only grow, so an expectation below is lost for good; one above may still be met by a request in front.
        if append.expected is not None and (
            append.expected < head or (append.expected > head and append.aggregate_id not in behind)
        ):
            request.problem = SequenceConflict(
                f"{append.aggregate_id!r} is at sequenceNo {head}, not at {append.expected}.",
                aggregateId=append.aggregate_id,
                expectedSequenceNo=append.expected,
                actualSequenceNo=head,
            )
            return


def _id_conflict(other: list[str], there: list[str], wanted: int) -> EventIdConflict:
    if other:
        return EventIdConflict(
            "These eventIds were appended before with other content or to another aggregate.", eventIds=other
        )
    return EventIdConflict(
        f"Of the {wanted} events of this atomic request these were appended before; repeat a request as it was.",
        eventIds=there,
    )


def too_late(request: Request) -> Problem:
    """The answer to a request whose deadline is over."""
    if request.uncertain:
        return OutcomeUnknown(
            "MongoDB did not say in time whether the events were written. Repeat the request with these eventIds: it"
            " appends them if they are missing, and returns their sequenceNo if they are there.",
            eventIds=request.event_ids(),
        )
    return Unavailable("Nothing was appended within the deadline; repeat the request.")
