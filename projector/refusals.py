"""What a verb may have to say instead of an answer; over HTTP as RFC 9457 `application/problem+json`.

Problem
├── Unauthorized   401  no bearer token, or none that is accepted
├── Forbidden      403  this process takes no orders over HTTP
├── NotFound       404  no such projection, aggregate or route
├── MethodNotAllowed 405
├── Conflict       409  not in this state
├── Invalid        422  `field` says where
├── Internal       500  a defect, logged whole
├── Unavailable    503  MongoDB does not answer, or too many wait
└── NotReached     504  the wait ended before the read model showed the event
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from eventstore.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "Conflict",
    "Forbidden",
    "Internal",
    "Invalid",
    "MethodNotAllowed",
    "NotFound",
    "NotReached",
    "Problem",
    "Unauthorized",
    "Unavailable",
]


class Unauthorized(Problem):
    """The caller must say who it is."""

    status, name, title = 401, "unauthorized", "A valid bearer token is required"
    headers: Mapping[str, str] = {"WWW-Authenticate": "Bearer"}


class Forbidden(Problem):
    """No token was configured, so nobody may."""

    status, name, title = 403, "forbidden", "This needs a bearer token, and none is configured"


class NotFound(Problem):
    """It is not there."""

    status, name, title = 404, "not-found", "Not found"


class MethodNotAllowed(Problem):
    """The route exists, the method does not."""

    status, name, title = 405, "method-not-allowed", "The method is not allowed here"

    def __init__(self, detail: str, allowed: Iterable[str]) -> None:
        super().__init__(detail)
        self.headers = {"Allow": ", ".join(allowed)}


class Conflict(Problem):
    """It cannot be done in the state that things are in."""

    status, name, title = 409, "conflict", "That cannot be done now"


class Invalid(Problem):
    """A field is missing, unknown, of the wrong type or out of range."""

    status, name, title = 422, "invalid", "A field is not valid"

    def __init__(self, field: str, reason: str, **members: Any) -> None:
        super().__init__(f"{field} {reason}" if field else reason, field=field or None, **members)


class Internal(Problem):
    """A defect; the log has the rest."""

    status, name, title = 500, "internal", "The projector failed"


class Unavailable(Problem):
    """A repeat may succeed."""

    status, name, title = 503, "unavailable", "Not available now"
    headers: Mapping[str, str] = {"Retry-After": "1"}


class NotReached(Problem):
    """The time was over."""

    status, name, title = 504, "not-reached", "The read model does not show the event yet"
