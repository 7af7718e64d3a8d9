"""The sidecar injector: which pods get the appender, what it looks like, and what the API server is answered."""

from __future__ import annotations

import base64
import copy
import io
import json
from typing import TYPE_CHECKING, Any

import jsonpatch
import pytest
from kubernetes_validate import validate

from projector.operator.injector import ANNOTATIONS, CONTAINER, AnnotationError, admit, application, inject
from projector.operator.metrics import Metrics
from projector.operator.settings import InjectorSettings

if TYPE_CHECKING:
    from pytest_aiohttp import AiohttpClient

SETTINGS = InjectorSettings(image="registry.example/eventprojector:1", own_namespace="eventprojector")


def pod(**annotations: str) -> dict[str, Any]:
    """A pod that asks for the sidecar, with more annotations (`_` for `-`)."""
    more = {f"eventprojector.io/{name.replace('_', '-')}": value for name, value in annotations.items()}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "shop", "annotations": {"eventprojector.io/inject": "true"} | more},
        "spec": {
            "containers": [{"name": "shop", "image": "shop:1"}],
            "initContainers": [{"name": "migrate", "image": "shop:1"}],
        },
    }


def review(obj: dict[str, Any], **request: Any) -> dict[str, Any]:
    base = {
        "uid": "u-1",
        "kind": {"group": "", "version": "v1", "kind": "Pod"},
        "operation": "CREATE",
        "namespace": "shop",
    }
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": base | {"object": obj} | request}


def sidecar(changed: dict[str, Any]) -> dict[str, Any]:
    return changed["spec"]["initContainers"][0]


def test_the_sidecar_is_a_native_one_and_restricted() -> None:
    changed = inject(pod(), SETTINGS)
    assert changed is not None
    validate(changed, "1.29", strict=True)
    container = sidecar(changed)
    assert [one["name"] for one in changed["spec"]["initContainers"]] == [CONTAINER, "migrate"]
    assert container["restartPolicy"] == "Always"
    assert container["image"] == "registry.example/eventprojector:1"
    assert container["startupProbe"]["httpGet"]["path"] == "/readyz"
    security = container["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    environment = {one["name"]: one.get("value") for one in container["env"]}
    assert environment["APPENDER_HOST"] == "127.0.0.1"
    assert environment["MONGODB_URI"] is None  # from the Secret
    assert changed["metadata"]["annotations"]["eventprojector.io/inject-status"] == "injected"


def test_once_is_enough() -> None:
    changed = inject(pod(), SETTINGS)
    assert changed is not None
    assert inject(changed, SETTINGS) is None
    own = pod()
    own["spec"]["containers"].append({"name": CONTAINER, "image": "mine:1"})
    assert inject(own, SETTINGS) is None


def test_a_pod_that_does_not_ask_is_left_alone() -> None:
    for value in ("false", "True", "yes", ""):
        other = pod()
        other["metadata"]["annotations"]["eventprojector.io/inject"] = value
        assert inject(other, SETTINGS) is None
    assert inject({"metadata": {}, "spec": {}}, SETTINGS) is None
    assert inject({}, SETTINGS) is None


def test_annotations_change_the_sidecar() -> None:
    wishes = {
        "image": "other:2",
        "log_level": "debug",
        "port": "9000",
        "database": "orders",
        "mongodb_secret": "mine",
        "mongodb_secret_key": "url",
        "max_event_bytes": "2048",
        "queue_events": "10",
        "drain_seconds": "5.5",
        "cpu_request": "50m",
        "cpu_limit": "1.5",
        "memory_request": "96Mi",
        "memory_limit": "1Gi",
    }
    assert {name.replace("_", "-") for name in wishes} == set(ANNOTATIONS)
    changed = inject(pod(**wishes), SETTINGS)
    assert changed is not None
    validate(changed, "1.29", strict=True)
    container = sidecar(changed)
    environment = {one["name"]: one for one in container["env"]}
    assert container["image"] == "other:2"
    assert environment["MONGODB_URI"]["valueFrom"]["secretKeyRef"] == {"name": "mine", "key": "url"}
    for name, value in (
        ("LOG_LEVEL", "debug"),
        ("APPENDER_PORT", "9000"),
        ("EVENTSTORE_DATABASE", "orders"),
        ("APPENDER_MAX_EVENT_BYTES", "2048"),
        ("APPENDER_QUEUE_EVENTS", "10"),
        ("APPENDER_DRAIN_SECONDS", "5.5"),
    ):
        assert environment[name]["value"] == value
    assert container["resources"] == {
        "requests": {"cpu": "50m", "memory": "96Mi"},
        "limits": {"cpu": "1.5", "memory": "1Gi"},
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image", "a b"),
        ("log-level", "trace"),
        ("port", "http"),
        ("database", "a.b"),
        ("mongodb-secret", "Not_A_Name"),
        ("cpu-limit", "lots"),
        ("memory-limit", "1 Gi"),
        ("drain-seconds", "-1"),
    ],
)
def test_a_bad_annotation_is_named(name: str, value: str) -> None:
    with pytest.raises(AnnotationError, match=f"eventprojector.io/{name}"):
        inject(pod(**{name: value}), SETTINGS)
    answer, result = admit(review(pod(**{name: value})), SETTINGS)
    assert result == "refused"
    assert answer["response"]["allowed"] is False
    assert name in answer["response"]["status"]["message"]


def test_the_patch_makes_the_pod() -> None:
    before = pod()
    answer, result = admit(review(before), SETTINGS)
    assert result == "injected"
    response = answer["response"]
    assert (response["uid"], response["allowed"], response["patchType"]) == ("u-1", True, "JSONPatch")
    patch = json.loads(base64.b64decode(response["patch"]))
    assert jsonpatch.apply_patch(copy.deepcopy(before), patch) == inject(before, SETTINGS)


def test_a_pod_without_init_containers() -> None:
    bare = pod()
    del bare["spec"]["initContainers"]
    answer, _ = admit(review(bare), SETTINGS)
    patch = json.loads(base64.b64decode(answer["response"]["patch"]))
    assert jsonpatch.apply_patch(bare, patch)["spec"]["initContainers"][0]["name"] == CONTAINER


@pytest.mark.parametrize(
    "request_",
    [
        {"namespace": "kube-system"},
        {"namespace": "kube-public"},
        {"namespace": "eventprojector"},
        {"operation": "UPDATE"},
        {"operation": "DELETE", "object": None},
        {"kind": {"group": "apps", "version": "v1", "kind": "Deployment"}},
        {"subResource": "ephemeralcontainers"},
    ],
    ids=str,
)
def test_what_is_never_touched(request_: dict[str, Any]) -> None:
    answer, result = admit(review(pod(), **request_), SETTINGS)
    assert result == "skipped"
    assert answer["response"] == {"uid": "u-1", "allowed": True}


async def test_over_http(aiohttp_client: AiohttpClient) -> None:
    metrics = Metrics(())
    client = await aiohttp_client(application(SETTINGS, metrics))
    answer = await client.post("/inject", json=review(pod()))
    assert answer.status == 200
    assert (await answer.json())["response"]["patchType"] == "JSONPatch"
    for nonsense in (b"", b"{", b"[]", b"{}", b'{"request": {}}', b'{"request": []}', b"null"):
        answer = await client.post("/inject", data=nonsense)
        assert answer.status == 400, nonsense
    answer = await client.post("/inject", data=io.BytesIO(b"x" * 5_000_000))
    assert answer.status == 413
    samples = next(iter(metrics.admissions.collect())).samples
    counted = {one.labels["result"]: one.value for one in samples if one.name.endswith("_total")}
    assert counted == {"injected": 1.0, "skipped": 0.0, "refused": 0.0, "error": 7.0}
