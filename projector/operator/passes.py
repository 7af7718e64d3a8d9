"""One pass over one resource, whatever its kind: decode, ask, act, and say in the status what was found.

A pass is idempotent and may be called at any time by anybody. It never raises for what a resource, MongoDB or another
party does wrong: that is what the conditions are for.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, Protocol, TypeVar

import aiohttp
import msgspec
import structlog
from pymongo.errors import ConfigurationError, InvalidName, OperationFailure, PyMongoError

from eventstore.errors import PASSING, Meaning, classify
from eventstore.logs import redact
from projector.operator.conditions import State, Verdict, conditions_of
from projector.operator.kubernetes import SecretUnreadableError
from projector.operator.mongo import Mongo, MongoAwayError
from projector.operator.ownership import Owner
from projector.operator.resource_status import EventStoreStatus, ProjectionStatus
from projector.operator.resources import PAUSED_ANNOTATION, Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from eventstore.settings import EventStoreSettings
    from projector.operator.build import Builder
    from projector.operator.kubernetes import Secrets
    from projector.operator.metrics import Metrics
    from projector.operator.mongo import Connections
    from projector.operator.settings import OperatorSettings
    from projector.operator.statuses import Statuses

__all__ = ["BadResourceError", "Context", "Outcome", "Resource", "brief", "run_pass"]

_log: Final = structlog.stdlib.get_logger(__name__)

_ERROR_LIMIT: Final = 200
_PASS_SECONDS: Final = 120.0
"""A pass asks a handful of questions that each end within 30 s; this is the last resort against one that hangs."""

_SOON: Final = frozenset(
    {"MongoUnavailable", "KubernetesUnavailable", "SecretUnreadable", "EventStoreNotFound", "Deleting", "InternalError"}
)
"""Reasons that go away by themselves, or by something that is no change of the resource."""

SpecT = TypeVar("SpecT", bound=msgspec.Struct)
StatusT = TypeVar("StatusT", EventStoreStatus, ProjectionStatus)


class BadResourceError(Exception):
    """The resource asks for what cannot be; the reason goes into the condition."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Resource:
    """A custom resource at the moment when the pass began; `generation` is that of this very spec."""

    kind: str
    namespace: str
    name: str
    uid: str
    generation: int
    spec: Mapping[str, Any]
    status: Mapping[str, Any]
    paused: bool

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Resource:
        """From an object of the Kubernetes API."""
        metadata = body["metadata"]
        return cls(
            kind=body["kind"],
            namespace=metadata["namespace"],
            name=metadata["name"],
            uid=metadata["uid"],
            generation=metadata.get("generation", 0),
            spec=_plain(body.get("spec", {})),
            status=_plain(body.get("status", {})),
            paused=(metadata.get("annotations") or {}).get(PAUSED_ANNOTATION) == "true",
        )

    @property
    def owner(self) -> Owner:
        """As MongoDB's records name it."""
        return Owner(self.kind, self.namespace, self.name, self.uid)


@dataclass
class Context:
    """What all passes share."""

    settings: OperatorSettings
    store: EventStoreSettings
    read_models: str
    """Database of the read models of Projections that name no EventStore."""
    connections: Connections
    builder: Builder
    secrets: Secrets
    statuses: Statuses
    metrics: Metrics
    event_stores: Callable[[str, str], Mapping[str, Any] | None] = field(default=lambda _namespace, _name: None)
    """Spec of the EventStore of that namespace and name; None when there is none."""

    async def mongo(self, namespace: str, connection: Connection | None) -> Mongo:
        """The connection that a resource means. Raises SecretUnreadableError, BadResourceError."""
        try:
            if connection is None:
                return self.connections.get("", self.store.mongodb_uri)
            reference = connection.secret_ref
            uri = await self.secrets.get(namespace, reference.name, reference.key)
            return self.connections.get(f"{namespace}/{reference.name}/{reference.key}", uri)
        except (PyMongoError, ValueError) as error:
            raise BadResourceError(
                "InvalidConnection", f"the connection string is wrong: {redact(str(error))}"
            ) from error


class Outcome(NamedTuple):
    """What a pass came to."""

    status: dict[str, Any]
    """The resource's new status, whole."""
    result: str
    """One of `metrics.RESULTS`."""
    soon: bool
    """Whether something is in motion, so that the next pass should come soon."""


class Kind(Protocol, Generic[SpecT, StatusT]):
    """What differs between the kinds."""

    name: str
    spec: type[SpecT]
    status: type[StatusT]

    async def reconcile(
        self, context: Context, resource: Resource, spec: SpecT, before: StatusT, done: Callable[[], None]
    ) -> tuple[StatusT, Verdict]:
        """Measures, compares, acts; returns the status (its conditions are filled in later) and the verdict."""

    async def finalize(self, context: Context, resource: Resource, spec: SpecT) -> None:
        """Does what the deletion policy says before the resource goes."""


async def run_pass(
    kind: Kind[SpecT, StatusT], context: Context, resource: Resource, done: Callable[[], None]
) -> Outcome:
    """One pass; `done` is called later if something was started in the background that asks for another one."""
    started = time.monotonic()
    before = _decoded(resource.status, kind.status)
    after, verdict = before, None
    if resource.paused:
        conditions = _paused(before, resource.generation)
    else:
        try:
            async with asyncio.timeout(_PASS_SECONDS):
                spec = _spec_of(kind, resource)
                after, verdict = await kind.reconcile(context, resource, spec, before, done)
        except Exception as error:  # noqa: BLE001 - every way to fail is a condition, and the next pass comes
            verdict = _steady(verdict_of(error, resource), before)
        conditions = conditions_of(verdict, resource.generation, before.conditions)
        after = msgspec.structs.replace(after, observed_generation=resource.generation)
    after = msgspec.structs.replace(after, conditions=conditions)
    outcome = Outcome(msgspec.to_builtins(after), _result(verdict), _in_motion(verdict))
    context.metrics.reconciles.labels(kind.name, outcome.result).inc()
    context.metrics.reconcile_seconds.labels(kind.name).observe(time.monotonic() - started)
    context.metrics.set_conditions(kind.name, resource.namespace, resource.name, conditions)
    context.metrics.last_pass.set_to_current_time()
    return outcome


def _spec_of(kind: Kind[SpecT, StatusT], resource: Resource) -> SpecT:
    try:
        return msgspec.convert(resource.spec, kind.spec)
    except msgspec.ValidationError as error:  # an older CRD let it through
        raise BadResourceError("InvalidSpec", str(error)) from error


def verdict_of(error: Exception, resource: Resource) -> Verdict:
    """What an error says of the resource."""
    state: State = "Unknown"
    if isinstance(error, MongoAwayError):
        error = error.error
    text = brief(str(error))
    match error:
        case BadResourceError():
            state, reason, text = "False", error.reason, redact(str(error))
        case SecretUnreadableError():
            state, reason = "False", "SecretUnreadable"
        case ConfigurationError() | InvalidName():
            state, reason = "False", "InvalidConnection"
        case PyMongoError() if classify(error) is Meaning.DENIED:
            reply = error.details or {} if isinstance(error, OperationFailure) else {}
            state, reason, text = "False", "AccessDenied", brief(str(reply.get("errmsg", error)))
        case PyMongoError() if classify(error) in PASSING:
            reason = "MongoUnavailable"
        case aiohttp.ClientError():
            reason = "KubernetesUnavailable"
        case _:
            reason, text = "InternalError", f"{type(error).__name__}: {text}"
            _log.error(
                "pass_failed", kind=resource.kind, namespace=resource.namespace, name=resource.name, exc_info=error
            )
    return Verdict(state, reason, text, degraded=f"{reason}: {text}" if state == "False" else "")


def _steady(verdict: Verdict, before: EventStoreStatus | ProjectionStatus) -> Verdict:
    """Keeps the message while the reason stays: the driver's texts carry times and ids, and each would be a write."""
    ready = next((condition for condition in before.conditions if condition.type == "Ready"), None)
    if verdict.ready != "Unknown" and verdict.reason != "AccessDenied":
        return verdict
    if ready is None or ready.reason != verdict.reason:
        return verdict
    degraded = f"{verdict.reason}: {ready.message}" if verdict.degraded else ""
    return Verdict(verdict.ready, verdict.reason, ready.message, degraded=degraded)


def brief(text: str) -> str:
    """The driver's first sentence, without credentials; it goes on with timeouts and the whole topology."""
    text = redact(text)
    for tail in (" (configured timeouts", ", Timeout:", ", Topology Description", " to execute command"):
        text = text.split(tail, 1)[0]
    return text[:_ERROR_LIMIT]


def _paused(before: EventStoreStatus | ProjectionStatus, generation: int) -> list[Any]:
    """The conditions as they were, with their observedGeneration, and `Paused`."""
    told = conditions_of(Verdict("Unknown", "Paused", "never reconciled", paused=True), generation, before.conditions)
    known = {condition.type: condition for condition in before.conditions}
    return [condition if condition.type == "Paused" else known.get(condition.type, condition) for condition in told]


def _result(verdict: Verdict | None) -> str:
    match verdict:
        case None:
            return "ready"
        case Verdict(reason="InternalError"):
            return "error"
        case Verdict(ready="Unknown"):
            return "unknown"
        case Verdict(progressing=text) if text:
            return "progressing"
    return "ready" if verdict.ready == "True" else "not_ready"


def _in_motion(verdict: Verdict | None) -> bool:
    """Whether to look again soon. A projector's progress is not among it: `Statuses` shows that by itself."""
    return verdict is not None and (verdict.reason in _SOON or verdict.progressing.startswith("BuildingIndexes"))


def _decoded(status: Mapping[str, Any], kind: type[StatusT]) -> StatusT:
    """The status of the last pass; one that an older version wrote and that no longer fits counts as none."""
    try:
        return msgspec.convert(status, kind, strict=False)
    except msgspec.ValidationError:
        return kind()


def _plain(value: Any) -> Any:
    """kopf's read-only views as dicts and lists of our own."""
    if isinstance(value, dict) or hasattr(value, "items"):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value
