"""The two ways to write a batch to the log, and what became of each event.

*Singles*: one `insert` without a transaction. Each document stands for itself and needs one round trip. Documents of one
aggregate must be `ordered`, so that the server stops at the first that fails and leaves no gap.
*Atomic*: a transaction, all or nothing.

Neither retries: an outcome is what the server said, and the committer has the say over what comes next.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Final

import structlog
from bson.int64 import Int64
from pymongo.errors import PyMongoError

from eventstore.client import MAJORITY
from eventstore.errors import Meaning, classify, duplicate_index, meaning_of_code
from eventstore.event import EVENTS, slot_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pymongo.asynchronous.client_session import AsyncClientSession

    from appender.encoding import Event
    from eventstore.client import Database

__all__ = ["OPERATION_SECONDS", "Outcome", "document", "insert_each", "insert_in", "outcome_of"]

_log = structlog.get_logger(__name__)

OPERATION_SECONDS: Final = 5.0
"""How long a batch may take before it counts as unknown. A disk that stalls longer costs a re-read; waiting longer on a
primary that is cut off would cost the callers their deadline."""

_WRITE_CONCERN: Final = MAJORITY.document | {"wtimeout": int(OPERATION_SECONDS * 1000)}


class Outcome(enum.Enum):
    """What became of a document, or of a whole batch."""

    WRITTEN = "written"
    NOT_TRIED = "not_tried"
    NUMBER_TAKEN = "number_taken"
    EVENT_ID_TAKEN = "event_id_taken"
    ABORTED = "transient_transaction"
    UNKNOWN = "unknown_outcome"
    UNAVAILABLE = "unavailable"
    REFUSED = "refused"


_OUTCOMES: Final[Mapping[Meaning, Outcome]] = {
    Meaning.AGAIN: Outcome.ABORTED,
    Meaning.UNKNOWN: Outcome.UNKNOWN,
    Meaning.UNAVAILABLE: Outcome.UNAVAILABLE,
    Meaning.DENIED: Outcome.UNAVAILABLE,
    Meaning.OVERFLOW: Outcome.UNAVAILABLE,  # the cache may have room again before the deadline
    Meaning.TOO_LARGE: Outcome.REFUSED,
    Meaning.REJECTED: Outcome.REFUSED,
}

_BY_SERVER: Final = frozenset({Outcome.UNKNOWN, Outcome.UNAVAILABLE})
"""Errors that come from the server's state, not from the document."""


def document(event: Event, aggregate_id: str, sequence_no: int) -> dict[str, Any]:
    """The event as the collection holds it."""
    made: dict[str, Any] = {
        "_id": event.event_id,
        "aggregateId": aggregate_id,
        "sequenceNo": Int64(sequence_no),
        "eventName": event.event_name,
        "timestamp": event.timestamp,
        "payload": event.payload,
        "slot": slot_of(aggregate_id),
    }
    if event.metadata is not None:
        made["metadata"] = event.metadata
    return made


def outcome_of(error: Exception) -> Outcome:
    """What an error means for everything that was sent. A defect counts as unknown."""
    if isinstance(error, TimeoutError) and not isinstance(error, PyMongoError):
        return Outcome.UNKNOWN
    meaning = classify(error)
    if meaning is Meaning.DUPLICATE:
        return _duplicate(getattr(error, "details", None))
    return _OUTCOMES.get(meaning, Outcome.UNKNOWN)


async def insert_each(database: Database, documents: Sequence[dict[str, Any]], *, ordered: bool) -> list[Outcome]:
    """Inserts single events without a transaction; what became of each, in order. Raises what pymongo raises."""
    reply = await database.command(
        {"insert": EVENTS, "documents": documents, "ordered": ordered, "writeConcern": _WRITE_CONCERN}
    )
    errors = reply.get("writeErrors")
    if not errors and "writeConcernError" not in reply:
        return [Outcome.WRITTEN] * len(documents)
    failed = {error["index"]: _of_write_error(error) for error in errors or ()}
    # Without the majority's word, or from a primary that steps down, what was written may still be rolled back.
    doubtful = "writeConcernError" in reply or not _BY_SERVER.isdisjoint(failed.values())
    written = Outcome.UNKNOWN if doubtful else Outcome.WRITTEN
    outcomes = [failed.get(index, written) for index in range(len(documents))]
    if ordered and failed:
        first = min(failed)
        outcomes[first + 1 :] = [Outcome.NOT_TRIED] * (len(documents) - first - 1)
    return outcomes


async def insert_in(
    session: AsyncClientSession, database: Database, documents: Sequence[dict[str, Any]]
) -> tuple[int, Outcome] | None:
    """Inserts events in the session's transaction; None, or the index of the one that failed and why. The transaction
    is then aborted already. Raises what pymongo raises.
    """
    reply = await database.command({"insert": EVENTS, "documents": documents, "ordered": True}, session=session)
    if errors := reply.get("writeErrors"):
        return errors[0]["index"], _of_write_error(errors[0])
    return None


def _of_write_error(error: Mapping[str, Any]) -> Outcome:
    meaning = meaning_of_code(error.get("code"))
    if meaning is Meaning.DUPLICATE:
        return _duplicate(error)
    found = _OUTCOMES.get(meaning)
    if found is None or found is Outcome.REFUSED:
        # Not errInfo, which holds what the event says.
        _log.error("write_refused", code=error.get("code"), reason=error.get("errmsg"))
    return found or Outcome.UNKNOWN


def _duplicate(details: Mapping[str, Any] | None) -> Outcome:
    return Outcome.EVENT_ID_TAKEN if duplicate_index(details) == ("_id",) else Outcome.NUMBER_TAKEN
