"""The operator as a process: kopf's handlers around the passes, the ops server, the order of start and end.

Every way to a pass (a resource was made, changed, seen again after a restart, or its time has come) leads to the same
function. Two handlers never work on one resource at once. A status is written when it has changed, an event when a
condition has; a pass that finds everything right writes nothing at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

import kopf
import msgspec
import structlog
from aiohttp import web
from prometheus_client import GCCollector, ProcessCollector
from prometheus_client.aiohttp import make_aiohttp_handler
from pymongo.errors import PyMongoError

from eventstore.settings import EventStoreSettings
from projector.operator import injector
from projector.operator.build import Builder
from projector.operator.conditions import transitions
from projector.operator.crds import KINDS
from projector.operator.eventstore import EventStoreKind
from projector.operator.kubernetes import Secrets, login
from projector.operator.metrics import Metrics
from projector.operator.mongo import Connections, MongoAwayError
from projector.operator.passes import Context, Resource, brief, run_pass
from projector.operator.projection import ProjectionKind
from projector.operator.resource_status import Condition
from projector.operator.resources import API_VERSION, GROUP
from projector.operator.settings import InjectorSettings, OperatorSettings
from projector.operator.statuses import Statuses
from projector.settings import ProjectorSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from projector.operator.statuses import View

__all__ = ["Operator", "run_operator"]

_log: Final = structlog.stdlib.get_logger(__name__)

_KIND_OF: Final[dict[str, EventStoreKind | ProjectionKind]] = {
    "EventStore": EventStoreKind(),
    "Projection": ProjectionKind(),
}
_JITTER: Final = 0.1
"""Part of the resync interval by which passes are spread, so that hundreds of resources do not march in step."""

_ECHO_SECONDS: Final = 5.0
"""So long a status that was written may take to come back by the watch; one that still differs then was changed by
somebody else, and is written again."""

_LAST_PASS_SECONDS: Final = 8.0
"""So long an end waits for the pass that runs: above the 5 s after which a question to an absent MongoDB is given up."""


@dataclass
class _Tracked:
    """What the operator keeps in memory about a resource; all of it may be lost."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    due: float = field(default_factory=time.monotonic)
    """`time.monotonic` of the next pass."""
    status: dict[str, Any] | None = None
    """The newest status, which a patch that was held up must write instead of its own, and which a pass goes on from:
    the resource that kopf shows lags behind what was just written."""
    written: float = 0.0
    """`time.monotonic` of the last write of the status."""
    view: View | None = None


class Operator:
    """Watches the resources and runs passes over them."""

    def __init__(
        self,
        settings: OperatorSettings,
        store: EventStoreSettings,
        read_models: str,
        injecting: InjectorSettings | None = None,
    ) -> None:
        self.settings = settings
        self._kopf = kopf_settings()
        self._injecting = injecting
        self.metrics = Metrics(_KIND_OF)
        self.context = Context(
            settings=settings,
            store=store,
            read_models=read_models,
            connections=Connections(),
            builder=Builder(),
            secrets=Secrets(lambda: login(settings=self._kopf)),
            statuses=Statuses(settings.poll_seconds),
            metrics=self.metrics,
        )
        self._tracked: dict[str, _Tracked] = {}
        self._servers: list[web.AppRunner] = []
        self._ending = asyncio.Event()
        self.port: int | None = None
        """Port of the ops server once it listens."""

    async def run(self, stopping: asyncio.Event) -> None:
        """Runs until `stopping` is set; then no new pass begins, those that run end, builds go on in the server."""
        namespaces = self.settings.namespaces
        await kopf.operator(
            registry=self.registry(),
            settings=self._kopf,
            standalone=True,
            clusterwide=not namespaces,
            namespaces=namespaces,
            stop_flag=stopping,
        )

    def registry(self) -> kopf.OperatorRegistry:
        """kopf's handlers."""
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry, id="login")(login)
        kopf.on.startup(registry=registry, id="start")(self._start)
        kopf.on.cleanup(registry=registry, id="stop")(self._stop)
        kopf.index(API_VERSION, "eventstores", registry=registry, id="event_stores")(_spec_by_name)
        for kind in KINDS:
            where: dict[str, Any] = {"registry": registry}
            # One id: whatever the cause, it is the same work. No value is returned, or kopf would put it into the status.
            for on in (kopf.on.create, kopf.on.update, kopf.on.resume):
                on(API_VERSION, kind.plural, id="reconcile", **where)(self._changed)
            kopf.on.delete(API_VERSION, kind.plural, id="finalize", **where)(self._deleted)
            kopf.on.event(API_VERSION, kind.plural, id="forget", **where)(self._seen)
            kopf.timer(
                API_VERSION,
                kind.plural,
                id="resync",
                interval=self.settings.poll_seconds,
                initial_delay=lambda **_: random.uniform(0, self.settings.poll_seconds),  # noqa: S311 - a jitter
                **where,
            )(self._tick)
        return registry

    async def _start(self, **_: Any) -> None:
        ops = web.Application()
        ops.router.add_get("/healthz", self._healthz)
        ops.router.add_get("/readyz", self._readyz)
        ops.router.add_get("/metrics", make_aiohttp_handler(self.metrics.registry))
        runner = web.AppRunner(ops, access_log=None, handle_signals=False)
        await runner.setup()
        self._servers.append(runner)
        await web.TCPSite(runner, self.settings.http_host, self.settings.http_port).start()
        self.port = runner.addresses[0][1]
        if self._injecting is not None and self._injecting.enabled:
            self._servers.append(await injector.serve(self._injecting, self.metrics))
        _log.info("operator_started", port=self.port, namespaces=list(self.settings.namespaces) or "all")

    async def _stop(self, **_: Any) -> None:
        self._ending.set()  # no pass begins any more
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_PASS_SECONDS):
                for tracked in list(self._tracked.values()):
                    async with tracked.lock:
                        pass
        await self.context.builder.close()
        await self.context.connections.close()
        for runner in self._servers:
            await runner.cleanup()
        _log.info("operator_stopped")

    async def _changed(self, *, body: kopf.Body, patch: kopf.Patch, **more: Any) -> None:
        await self._pass(body, patch, more["event_stores"])

    async def _tick(self, *, body: kopf.Body, patch: kopf.Patch, **more: Any) -> None:
        event_stores = more["event_stores"]
        tracked = self._tracked.get(body["metadata"]["uid"])
        if tracked is None or self._ending.is_set():
            return  # the handlers have not been through yet
        if time.monotonic() < tracked.due and not await self._has_news(body, tracked, event_stores):
            return
        await self._pass(body, patch, event_stores)

    async def _has_news(self, body: kopf.Body, tracked: _Tracked, event_stores: kopf.Index[Any, Any]) -> bool:
        """Whether the projector says something else than at the last pass."""
        kind = _KIND_OF[body["kind"]]
        if not isinstance(kind, ProjectionKind):
            return False
        resource = Resource.from_body(body)
        view = None if resource.paused else await kind.view(self._context(event_stores), resource)
        return view is not None and view != tracked.view

    async def _pass(self, body: kopf.Body, patch: kopf.Patch, event_stores: kopf.Index[Any, Any]) -> None:
        resource = Resource.from_body(body)
        kind = _KIND_OF[resource.kind]
        context = self._context(event_stores)
        tracked = self._tracked.setdefault(resource.uid, _Tracked())

        def done() -> None:
            tracked.due = time.monotonic()

        async with tracked.lock:
            if self._ending.is_set():
                return
            resource = Resource.from_body(body)  # it may have changed while we waited
            shown, before = resource.status, tracked.status if tracked.status is not None else resource.status
            resource = dataclasses.replace(resource, status=before)
            tracked.due = float("inf")
            if isinstance(kind, ProjectionKind):
                tracked.view = None if resource.paused else await kind.view(context, resource)
            outcome = await run_pass(cast("Any", kind), context, resource, done)
            if self._ending.is_set():
                return  # it was cut short: what it says of the resource is not true
            interval = self.settings.poll_seconds if outcome.soon else self.settings.resync_seconds
            interval *= random.uniform(1 - _JITTER, 1)  # noqa: S311 - a jitter
            tracked.due = min(tracked.due, time.monotonic() + interval)
            tracked.status = outcome.status
            now = time.monotonic()
            if outcome.status != before or (outcome.status != shown and now > tracked.written + _ECHO_SECONDS):
                tracked.written = now
                patch.fns.append(_write_status(tracked))
            if outcome.status != before:
                self._announce(body, resource, outcome.status)

    def _announce(self, body: kopf.Body, resource: Resource, status: Mapping[str, Any]) -> None:
        """Kubernetes events and log lines for the conditions that have changed."""
        before = _conditions(resource.status)
        for condition in transitions(before, _conditions(status)):
            good = condition.type == "Progressing" or (condition.type == "Ready" and condition.status == "True")
            good = good or (condition.status == "Unknown" and not before)  # as new resources are
            kopf.event(
                body,
                type="Normal" if good else "Warning",
                reason=condition.reason,
                message=f"{condition.type} is {condition.status}: {condition.message}"[:1_000],
            )
            _log.info(
                "condition_changed",
                kind=resource.kind,
                namespace=resource.namespace,
                name=resource.name,
                condition=condition.type,
                status=condition.status,
                reason=condition.reason,
            )

    async def _deleted(self, *, body: kopf.Body, **more: Any) -> None:
        resource = Resource.from_body(body)
        kind: Any = _KIND_OF[resource.kind]
        tracked = self._tracked.setdefault(resource.uid, _Tracked())
        async with tracked.lock:
            tracked.due = float("inf")  # no pass is due any more, however long the deletion takes
            try:
                spec = msgspec.convert(resource.spec, kind.spec)
                await kind.finalize(self._context(more["event_stores"]), resource, spec)
            except msgspec.ValidationError:
                pass  # it was never reconciled: there is nothing to undo
            except (PyMongoError, MongoAwayError) as error:
                why = brief(str(error))
                kopf.event(body, type="Warning", reason="DeletionWaits", message=f"MongoDB: {why}")
                raise kopf.TemporaryError(f"MongoDB: {why}", delay=3 * self.settings.poll_seconds) from error
        _log.info("resource_deleted", kind=resource.kind, namespace=resource.namespace, name=resource.name)

    async def _seen(self, *, body: kopf.Body, **more: Any) -> None:
        """Forgets a resource that is gone, also one whose finalizer somebody took away."""
        if more["type"] == "DELETED":
            metadata = body["metadata"]
            self._tracked.pop(metadata["uid"], None)
            self.metrics.forget(body["kind"], metadata["namespace"], metadata["name"])

    def _context(self, event_stores: kopf.Index[Any, Any]) -> Context:
        def find(namespace: str, name: str) -> Mapping[str, Any] | None:
            return next(iter(event_stores.get((namespace, name), ())), None)

        self.context.event_stores = find
        return self.context

    async def _healthz(self, _request: web.Request) -> web.Response:
        """503 when a pass that is due stays away: the loop turns, yet the work does not."""
        now = time.monotonic()
        overdue = max((now - tracked.due for tracked in self._tracked.values()), default=0.0)
        stalled = overdue > self.settings.stalled_seconds
        return web.json_response(
            {"status": "stalled" if stalled else "ok", "overdueSeconds": max(0, round(overdue))},
            status=503 if stalled else 200,
        )

    async def _readyz(self, _request: web.Request) -> web.Response:
        return web.json_response({"status": "ready", "resources": len(self._tracked)})


def kopf_settings() -> kopf.OperatorSettings:
    """kopf's settings: nothing under kopf's own names in users' resources, and no rights beyond those resources."""
    settings = kopf.OperatorSettings()
    settings.persistence.finalizer = f"{GROUP}/operator"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=f"operator.{GROUP}", v1=False)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(
        prefix=f"operator.{GROUP}", key="last-handled", v1=False
    )
    settings.scanning.disabled = True
    settings.posting.reporting_component = "eventprojector-operator"
    settings.posting.event_name_prefix = "eventprojector-"
    settings.networking.request_timeout = 30.0
    settings.background.instant_exit_timeout = _LAST_PASS_SECONDS
    settings.process.ultimate_exiting_timeout = 60.0
    return settings


def _spec_by_name(*, namespace: str | None, name: str, spec: kopf.Spec, **_: Any) -> Any:
    """kopf's index of EventStores, from which Projections learn where their log is."""
    return {(namespace, name): dict(spec)}


def _write_status(tracked: _Tracked) -> Callable[[Any], None]:
    """A change of the body that kopf sends as JSON Patch under the resource's version, again after a conflict."""

    def write(body: Any) -> None:
        if tracked.status is not None:
            body["status"] = tracked.status

    return write


def _conditions(status: Mapping[str, Any]) -> list[Condition]:
    return msgspec.convert(status.get("conditions", []), list[Condition])


async def run_operator(stopping: asyncio.Event) -> None:
    """The operator from its environment, for `eventstore.service.run`. Raises pydantic's ValidationError at start."""
    for name in ("kopf.objects", "kopf.activities"):
        logging.getLogger(name).setLevel(logging.WARNING)  # one line per handler call otherwise
    store = EventStoreSettings()
    read_models = ProjectorSettings().database or store.eventstore_database
    operator = Operator(OperatorSettings(), store, read_models, InjectorSettings())
    ProcessCollector(registry=operator.metrics.registry)
    GCCollector(registry=operator.metrics.registry)
    with contextlib.suppress(asyncio.CancelledError):
        await operator.run(stopping)
