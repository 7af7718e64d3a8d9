"""The sidecar injector: a mutating webhook that adds the appender to pods which ask for it by an annotation.

Apart from kopf on purpose: it stands in the way of pods, so it should be little, and fail by itself. The API server
should call it for pods with the annotation alone (`matchConditions`), ignore its absence, and never for the operator's
own namespace; the handler keeps to the same rules whatever the webhook's configuration says.
"""

from __future__ import annotations

import base64
import copy
import re
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import jsonpatch
import msgspec
import structlog
from aiohttp import web

from projector.operator.resources import GROUP

if TYPE_CHECKING:
    from collections.abc import Mapping

    from projector.operator.metrics import Metrics
    from projector.operator.settings import InjectorSettings

__all__ = ["ANNOTATIONS", "CONTAINER", "AnnotationError", "admit", "inject", "serve"]

_log: Final = structlog.stdlib.get_logger(__name__)

CONTAINER: Final = "appender"
_STATUS: Final = f"{GROUP}/inject-status"
_MAX_BODY: Final = 4 * 1024 * 1024
"""An object in etcd has at most 1.5 MiB; a review may hold it twice."""

_QUANTITY: Final = re.compile(r"[0-9]+(\.[0-9]+)?([EPTGM]i?|Ki?|k|m)?")
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_KEY: Final = re.compile(r"[-._a-zA-Z0-9]{1,253}")
_IMAGE: Final = re.compile(r"[^\s]{1,500}")
_NUMBER: Final = re.compile(r"[0-9]{1,10}")
_LEVEL: Final = re.compile(r"debug|info|warning|error")
_DATABASE: Final = re.compile(r'[^/\\. "$*<>:|?]{1,63}')
_SECONDS: Final = re.compile(r"[0-9]{1,4}(\.[0-9]+)?")

ANNOTATIONS: Final[dict[str, tuple[re.Pattern[str], str]]] = {
    "image": (_IMAGE, "image of the sidecar"),
    "log-level": (_LEVEL, "debug, info, warning or error"),
    "port": (_NUMBER, "port on the pod's loopback, 8080 by default"),
    "database": (_DATABASE, "database of the log"),
    "mongodb-secret": (_NAME, "Secret in the pod's namespace with the connection string"),
    "mongodb-secret-key": (_KEY, "key in that Secret, `uri` by default"),
    "max-event-bytes": (_NUMBER, "largest event"),
    "queue-events": (_NUMBER, "events that may wait"),
    "drain-seconds": (_SECONDS, "how long the queue may drain at the end"),
    "cpu-request": (_QUANTITY, "a quantity"),
    "cpu-limit": (_QUANTITY, "a quantity"),
    "memory-request": (_QUANTITY, "a quantity"),
    "memory-limit": (_QUANTITY, "a quantity"),
}
"""Annotations beside `eventprojector.io/inject: "true"`: without the prefix, what they may be, and what they mean."""

_ENVIRONMENT: Final = {
    "log-level": "LOG_LEVEL",
    "max-event-bytes": "APPENDER_MAX_EVENT_BYTES",
    "queue-events": "APPENDER_QUEUE_EVENTS",
    "drain-seconds": "APPENDER_DRAIN_SECONDS",
}


class AnnotationError(ValueError):
    """An annotation of the pod cannot be what it says; the text names it."""


def inject(pod: Mapping[str, Any], settings: InjectorSettings) -> dict[str, Any] | None:
    """The pod with the sidecar; None when it does not ask for one, or has one already. Raises AnnotationError."""
    metadata = pod.get("metadata") or {}
    annotations = metadata.get("annotations") or {}
    if annotations.get(f"{GROUP}/inject") != "true":
        return None
    spec = pod.get("spec") or {}
    names = {container.get("name") for kind in ("initContainers", "containers") for container in spec.get(kind) or ()}
    if CONTAINER in names:
        return None
    wanted = _wanted(annotations)
    changed: dict[str, Any] = copy.deepcopy(dict(pod))
    # First among the init containers, so that those which append find it running.
    changed["spec"]["initContainers"] = [_container(wanted, settings), *(spec.get("initContainers") or ())]
    changed["metadata"].setdefault("annotations", {})[_STATUS] = "injected"
    return changed


def _wanted(annotations: Mapping[str, str]) -> dict[str, str]:
    prefix = f"{GROUP}/"
    wanted = {}
    for key, value in annotations.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name not in ANNOTATIONS:
            continue
        pattern, meaning = ANNOTATIONS[name]
        if not pattern.fullmatch(value):
            raise AnnotationError(f"annotation {key}: {value!r} is not allowed; it must be: {meaning}")
        wanted[name] = value
    return wanted


def _container(wanted: Mapping[str, str], settings: InjectorSettings) -> dict[str, Any]:
    """The native sidecar, as the chart's template of the same name makes it."""
    environment: list[dict[str, Any]] = [
        {
            "name": "MONGODB_URI",
            "valueFrom": {
                "secretKeyRef": {
                    "name": wanted.get("mongodb-secret", settings.secret_name),
                    "key": wanted.get("mongodb-secret-key", settings.secret_key),
                }
            },
        },
        {"name": "EVENTSTORE_DATABASE", "value": wanted.get("database", settings.database)},
        {"name": "EVENTSTORE_PROVISION", "value": "false"},
        {"name": "APPENDER_HOST", "value": "127.0.0.1"},
        {"name": "APPENDER_PORT", "value": wanted.get("port", "8080")},
        {"name": "APPENDER_OPS_PORT", "value": str(settings.ops_port)},
    ]
    environment += [{"name": _ENVIRONMENT[name], "value": wanted[name]} for name in _ENVIRONMENT if name in wanted]
    resources: dict[str, dict[str, str]] = {}
    for kind, key in (("request", "requests"), ("limit", "limits")):
        amounts = {unit: wanted[f"{unit}-{kind}"] for unit in ("cpu", "memory") if f"{unit}-{kind}" in wanted}
        if amounts:
            resources[key] = amounts
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": wanted.get("image", settings.image),
        "imagePullPolicy": settings.image_pull_policy,
        "args": ["appender", "serve"],
        "restartPolicy": "Always",
        "env": environment,
        "ports": [{"name": "appender-ops", "containerPort": settings.ops_port}],
        "startupProbe": _probe(settings.ops_port, "/readyz", periodSeconds=1, failureThreshold=600),
        "livenessProbe": _probe(settings.ops_port, "/healthz", periodSeconds=10, failureThreshold=6),
        "readinessProbe": _probe(settings.ops_port, "/readyz", periodSeconds=5, failureThreshold=3),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if resources:
        container["resources"] = resources
    return container


def _probe(port: int, path: str, **numbers: int) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": port}, "timeoutSeconds": 3, **numbers}


def admit(review: Mapping[str, Any], settings: InjectorSettings) -> tuple[dict[str, Any], str]:
    """The answer to an AdmissionReview, and what it was: injected, skipped or refused.

    Everything that is no pod in the making of a namespace of users is let through as it is. Raises KeyError and
    TypeError for what is no review.
    """
    request = review["request"]
    response: dict[str, Any] = {"uid": request["uid"], "allowed": True}
    result = "skipped"
    namespace = str(request.get("namespace", ""))
    ours = namespace == settings.own_namespace or namespace.startswith("kube-")
    is_pod = (request.get("kind") or {}).get("kind") == "Pod" and not request.get("subResource")
    if is_pod and request.get("operation") == "CREATE" and not ours:
        pod = request["object"]
        try:
            changed = inject(pod, settings)
        except AnnotationError as error:
            # The pod asks for a sidecar: without one it would start and fail later, without a word of why.
            response |= {"allowed": False, "status": {"code": 422, "reason": "Invalid", "message": str(error)}}
            result = "refused"
        else:
            if changed is not None:
                patch = jsonpatch.make_patch(pod, changed).patch
                response |= {"patchType": "JSONPatch", "patch": base64.b64encode(msgspec.json.encode(patch)).decode()}
                result = "injected"
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}, result


def application(settings: InjectorSettings, metrics: Metrics) -> web.Application:
    """The webhook: `POST /inject`."""

    async def handle(request: web.Request) -> web.Response:
        try:
            review = msgspec.json.decode(await request.read())
            answer, result = admit(review, settings)
        except (msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
            metrics.admissions.labels("error").inc()
            _log.warning("admission_not_understood", error=type(error).__name__)
            return web.json_response({"error": "this is no AdmissionReview of a pod"}, status=400)
        metrics.admissions.labels(result).inc()
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    app = web.Application(client_max_size=_MAX_BODY)
    app.router.add_post("/inject", handle)
    return app


class _Certificate:
    """The certificate from its files; one that was renewed is taken up by the next connection."""

    def __init__(self, settings: InjectorSettings) -> None:
        self._files = (settings.cert_file, settings.key_file)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._loaded: tuple[int, ...] = ()
        self._load()
        self.context.sni_callback = self._before_handshake

    def _before_handshake(self, _connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        try:
            self._load()
        except (OSError, ssl.SSLError) as error:  # half written; the next connection tries again
            _log.warning("certificate_not_loaded", error=type(error).__name__)

    def _load(self) -> None:
        stamp = tuple(Path(file).stat().st_mtime_ns for file in self._files)
        if stamp != self._loaded:
            self.context.load_cert_chain(*self._files)
            self._loaded = stamp


async def serve(settings: InjectorSettings, metrics: Metrics) -> web.AppRunner:
    """Starts the webhook's server. Raises OSError and ssl.SSLError when the certificate cannot be loaded."""
    runner = web.AppRunner(application(settings, metrics), access_log=None, handle_signals=False)
    await runner.setup()
    await web.TCPSite(runner, settings.host, settings.port, ssl_context=_Certificate(settings).context).start()
    _log.info("injector_started", port=runner.addresses[0][1])
    return runner
