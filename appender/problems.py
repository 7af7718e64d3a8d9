"""What a caller may have to hear, as RFC 9457 `application/problem+json` with a stable `type`.

    Problem
    ├── Malformed             400  not JSON, or not HTTP as this route takes it
    ├── Unauthorized          401
    ├── NotFound              404
    ├── MethodNotAllowed      405
    ├── SlowRequest           408  the body stopped coming
    ├── SequenceConflict      409  `actualSequenceNo` says where the aggregate is
    ├── EventIdConflict       409  `eventIds` says which are taken by other events
    ├── TooLarge              413
    ├── UnsupportedMediaType  415
    ├── Invalid               422  `field` says where, `detail` says why
    ├── Internal              500  a defect of ours, logged whole
    └── Unavailable           503  with Retry-After
        ├── QueueFull
        ├── Draining
        └── OutcomeUnknown    `eventIds` to repeat with

The appender's inner parts raise them or hand them over as the outcome of an append; `appender.endpoint` renders them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eventstore.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "TYPES",
    "Draining",
    "EventIdConflict",
    "Internal",
    "Invalid",
    "Malformed",
    "MethodNotAllowed",
    "NotFound",
    "OutcomeUnknown",
    "Problem",
    "QueueFull",
    "SequenceConflict",
    "SlowRequest",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "UnsupportedMediaType",
]


class Malformed(Problem):
    """The body is not what its Content-Type says."""

    status, name, title = 400, "malformed", "The request is malformed"


class Unauthorized(Problem):
    """No bearer token, or none that is accepted."""

    status, name, title = 401, "unauthorized", "A valid bearer token is required"
    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}


class NotFound(Problem):
    """No such aggregate, or no such route."""

    status, name, title = 404, "not-found", "Not found"


class MethodNotAllowed(Problem):
    """The route exists, the method does not."""

    status, name, title = 405, "method-not-allowed", "The method is not allowed here"

    def __init__(self, detail: str, allowed: str) -> None:
        super().__init__(detail)
        self.headers = {"Allow": allowed}


class SlowRequest(Problem):
    """The client fell silent in the middle of its body."""

    status, name, title = 408, "request-timeout", "The request took too long to arrive"
    headers: Mapping[str, str] = {"Connection": "close"}


class SequenceConflict(Problem):
    """The aggregate is not where the caller expected it."""

    status, name, title = 409, "sequence-conflict", "The aggregate has moved on"


class EventIdConflict(Problem):
    """An eventId stands for another event already."""

    status, name, title = 409, "event-id-conflict", "The eventId belongs to another event"


class TooLarge(Problem):
    """An event, a request or a batch is over its limit."""

    status, name, title = 413, "too-large", "Too large"


class UnsupportedMediaType(Problem):
    """The Content-Type is none that the route takes."""

    status, name, title = 415, "unsupported-media-type", "The media type is not supported"


class Invalid(Problem):
    """Well-formed, but a field is missing, unknown, of the wrong type or out of range."""

    status, name, title = 422, "invalid", "A field is not valid"

    def __init__(self, field: str, reason: str, **members: Any) -> None:
        super().__init__(f"{field} {reason}" if field else reason, field=field or None, **members)


class Internal(Problem):
    """A defect; the log has the rest."""

    status, name, title = 500, "internal", "The appender failed"


class Unavailable(Problem):
    """Nothing was appended, and a repeat may succeed."""

    status, name, title = 503, "unavailable", "MongoDB cannot be reached or cannot write now"
    headers: Mapping[str, str] = {"Retry-After": "1"}


class QueueFull(Unavailable):
    """More waits than memory may hold."""

    name, title = "queue-full", "Too many appends are waiting"


class Draining(Unavailable):
    """The appender is shutting down."""

    name, title = "draining", "The appender is shutting down"


class OutcomeUnknown(Unavailable):
    """It may have been appended; a repeat with the same eventIds tells, and appends nothing twice."""

    name, title = "outcome-unknown", "It is not known whether the events were appended"


TYPES: tuple[type[Problem], ...] = (
    Malformed,
    Unauthorized,
    NotFound,
    MethodNotAllowed,
    SlowRequest,
    SequenceConflict,
    EventIdConflict,
    TooLarge,
    UnsupportedMediaType,
    Invalid,
    Internal,
    Unavailable,
    QueueFull,
    Draining,
    OutcomeUnknown,
)
"""All problems, for the OpenAPI document and the reference."""
