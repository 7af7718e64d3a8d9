"""What a MongoDB error means for us: one table, by code and label, never by message text.

    Meaning
    ├── AGAIN          the transaction left nothing behind: run it again
    ├── DUPLICATE      a unique key is taken: which one, says `duplicate_index`
    ├── UNKNOWN        it may have been written: re-read before saying anything
    ├── UNAVAILABLE    nothing was sent, or nothing was accepted: wait and try later
    ├── REOPEN         a cursor died, its position is good: open it again from the last token
    ├── POSITION_LOST  no cursor can be opened from this position ever again: repair from the log
    ├── TOO_LARGE      a document or message is over a limit of the server
    ├── OVERFLOW       the transaction is more than the server's cache has room for, and left nothing behind: write less at once
    ├── REJECTED       the document does not fit BSON or the collection's validator
    ├── DENIED         credentials or roles do not suffice
    ├── INDEX_CONFLICT an index of that name or those keys exists with other options
    └── UNEXPECTED     none of these: a defect, to be logged whole

A label wins over a code: the server puts labels on by circumstance, which a code alone does not tell.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from bson.errors import InvalidDocument
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ConnectionFailure,
    DocumentTooLarge,
    ExecutionTimeout,
    NetworkTimeout,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WaitQueueTimeoutError,
    WTimeoutError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PASSING", "TABLE", "Meaning", "Row", "classify", "duplicate_index", "meaning_of_code"]


class Meaning(enum.Enum):
    """What the caller should do; the module's docstring has the list."""

    AGAIN = "again"
    DUPLICATE = "duplicate"
    UNKNOWN = "unknown"
    UNAVAILABLE = "unavailable"
    REOPEN = "reopen"
    POSITION_LOST = "position_lost"
    TOO_LARGE = "too_large"
    OVERFLOW = "overflow"
    REJECTED = "rejected"
    DENIED = "denied"
    INDEX_CONFLICT = "index_conflict"
    UNEXPECTED = "unexpected"


PASSING: Final = frozenset({Meaning.AGAIN, Meaning.UNKNOWN, Meaning.UNAVAILABLE, Meaning.OVERFLOW})
"""They come from the state of the server or of the way to it, not from what was asked, even if they are told of a document."""


class Row(NamedTuple):
    """One row of the table: a server code or an error label, its meaning, and the reason for it."""

    key: int | str
    meaning: Meaning
    reason: str


TABLE: Final[tuple[Row, ...]] = (
    # Labels, in the order in which they are asked for.
    Row("UnknownTransactionCommitResult", Meaning.UNKNOWN, "the commit was sent and no answer came back"),
    Row(
        "TransientTransactionError",
        Meaning.AGAIN,
        "the server promises that the transaction left nothing behind",
    ),
    Row("NonResumableChangeStreamError", Meaning.POSITION_LOST, "the server says that resuming cannot help"),
    Row("ResumableChangeStreamError", Meaning.REOPEN, "the server says that resuming helps"),
    # Transactions and unique keys.
    Row(112, Meaning.AGAIN, "WriteConflict: another transaction wrote the same document first"),
    Row(251, Meaning.AGAIN, "NoSuchTransaction: it was aborted, by a new primary or by its lifetime"),
    Row(24, Meaning.AGAIN, "LockTimeout: a transaction gave up waiting for a lock, and was aborted"),
    Row(246, Meaning.AGAIN, "SnapshotUnavailable: the collection changed while the transaction began"),
    Row(11000, Meaning.DUPLICATE, "DuplicateKey"),
    Row(11001, Meaning.DUPLICATE, "DuplicateKey, as an update reports it"),
    # Sent, and perhaps carried out.
    Row(64, Meaning.UNKNOWN, "WriteConcernFailed: written here, not yet by a majority"),
    Row(50, Meaning.UNKNOWN, "MaxTimeMSExpired: the server stopped waiting, maybe after the write"),
    Row(262, Meaning.UNKNOWN, "ExceededTimeLimit: as MaxTimeMSExpired, from a router"),
    Row(91, Meaning.UNKNOWN, "ShutdownInProgress: the server ends, maybe after the write"),
    Row(11600, Meaning.UNKNOWN, "InterruptedAtShutdown: as ShutdownInProgress"),
    Row(11601, Meaning.UNKNOWN, "Interrupted: the operation or its session was killed, maybe after the write"),
    Row(11602, Meaning.UNKNOWN, "InterruptedDueToReplStateChange: stepped down, maybe after the write"),
    Row(189, Meaning.UNKNOWN, "PrimarySteppedDown: maybe after the write, while waiting for the majority"),
    # Not carried out, by a server that cannot write now.
    Row(10107, Meaning.UNAVAILABLE, "NotWritablePrimary: it refused before writing"),
    Row(13435, Meaning.UNAVAILABLE, "NotPrimaryNoSecondaryOk: it refused before reading"),
    Row(13436, Meaning.UNAVAILABLE, "NotPrimaryOrSecondary: it is recovering"),
    Row(6, Meaning.UNAVAILABLE, "HostUnreachable: a router did not reach the shard"),
    Row(7, Meaning.UNAVAILABLE, "HostNotFound: a router did not find the shard"),
    Row(133, Meaning.UNAVAILABLE, "FailedToSatisfyReadPreference: a router knows of no primary"),
    Row(365, Meaning.UNAVAILABLE, "TemporarilyUnavailable: its cache is full, and it gave up making room"),
    # Change streams and cursors.
    Row(43, Meaning.REOPEN, "CursorNotFound: it timed out, or its server restarted"),
    Row(237, Meaning.REOPEN, "CursorKilled"),
    Row(175, Meaning.REOPEN, "QueryPlanKilled: an election or a dropped index killed the plan"),
    Row(234, Meaning.REOPEN, "RetryChangeStream"),
    Row(286, Meaning.POSITION_LOST, "ChangeStreamHistoryLost: the token aged out of the oplog"),
    Row(
        280,
        Meaning.POSITION_LOST,
        "ChangeStreamFatalError: the filter no longer lets the token's event through",
    ),
    Row(260, Meaning.POSITION_LOST, "InvalidResumeToken"),
    Row(50811, Meaning.POSITION_LOST, "an older server's word for a token that it cannot find"),
    # Limits and rules.
    Row(388, Meaning.OVERFLOW, "TransactionTooLargeForCache: rolled back to make room, and would be again"),
    Row(10334, Meaning.TOO_LARGE, "BSONObjectTooLarge: over 16 MiB, a change event too"),
    Row(17419, Meaning.TOO_LARGE, "the document would grow over 16 MiB by this update"),
    Row(17420, Meaning.TOO_LARGE, "the document to insert is over 16 MiB"),
    Row(121, Meaning.REJECTED, "DocumentValidationFailure: the collection's validator refused it"),
    Row(13, Meaning.DENIED, "Unauthorized"),
    Row(18, Meaning.DENIED, "AuthenticationFailed"),
    Row(8000, Meaning.DENIED, "AtlasError: on a hosted cluster, mostly bad credentials"),
    Row(85, Meaning.INDEX_CONFLICT, "IndexOptionsConflict: same keys, other name or options"),
    Row(86, Meaning.INDEX_CONFLICT, "IndexKeySpecsConflict: same name, other keys"),
)

_LABELS: Final = tuple((row.key, row.meaning) for row in TABLE if isinstance(row.key, str))
_CODES: Final = {row.key: row.meaning for row in TABLE if isinstance(row.key, int)}


def meaning_of_code(code: int | None) -> Meaning:
    """The meaning of a server's error code, as it stands in a `writeErrors` entry."""
    return _CODES.get(code, Meaning.UNEXPECTED) if code is not None else Meaning.UNEXPECTED


def classify(error: BaseException) -> Meaning:
    """The meaning of an error that pymongo raised; of any other error UNEXPECTED."""
    if isinstance(error, InvalidDocument):
        return Meaning.REJECTED
    if not isinstance(error, PyMongoError):
        return Meaning.UNEXPECTED
    for label, meaning in _LABELS:
        if error.has_error_label(str(label)):
            return meaning
    if isinstance(error, BulkWriteError):
        codes = [entry.get("code") for entry in (error.details or {}).get("writeErrors", [])]
        return meaning_of_code(codes[0]) if codes else Meaning.UNKNOWN  # no write error: the write concern failed
    if isinstance(error, OperationFailure) and not isinstance(error, WTimeoutError | ExecutionTimeout):
        return meaning_of_code(error.code)
    return _of_driver(error)


def _of_driver(error: PyMongoError) -> Meaning:
    """The meaning of what the driver found out by itself."""
    match error:
        case ServerSelectionTimeoutError() | WaitQueueTimeoutError():
            return Meaning.UNAVAILABLE  # nothing was sent
        case WTimeoutError() | ExecutionTimeout() | NetworkTimeout():
            return Meaning.UNKNOWN
        case AutoReconnect() | ConnectionFailure():
            code = getattr(error, "code", None)  # NotPrimaryError carries the server's
            known = meaning_of_code(code)
            return known if known is not Meaning.UNEXPECTED else Meaning.UNKNOWN
        case DocumentTooLarge():
            return Meaning.TOO_LARGE
    return Meaning.UNKNOWN if error.timeout else Meaning.UNEXPECTED


def duplicate_index(details: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The keys of the unique index that a duplicate-key error names: `("_id",)` or `("aggregateId", "sequenceNo")`.

    `details` is an entry of `writeErrors`, or `OperationFailure.details`; the server sends `keyPattern` since 4.2.
    """
    return tuple((details or {}).get("keyPattern") or ())
