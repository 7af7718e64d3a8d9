"""Install, append, project, break, scale, upgrade, uninstall: on a real cluster, as its users would."""

from __future__ import annotations

import base64
import collections
import csv
import datetime
import gzip
import json
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import missing
from tests.e2e.cluster import Namespace, eventually
from tests.e2e.conftest import OTHER_NAMESPACE, ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CHART = str(ROOT / "deploy" / "helm")
EXAMPLES = ROOT / "examples" / "kubernetes"
RECEIPT = ROOT.parent / "shared" / "data" / "receipt.csv"
MONGOD = "mongo-eventprojector-mongodb-0"
SECRET = "mongo-eventprojector-mongodb"
TOKEN = "an-end-to-end-token"
Document = dict[str, Any]


@pytest.fixture(scope="session")
def values(image: dict[str, str]) -> dict[str, Any]:
    """The event store's values: a MongoDB that outlives it, and a short resync so that drift is seen soon."""
    return {
        "image": image,
        "mongodb": {"existingSecret": {"name": SECRET}},
        "operator": {"resyncSeconds": 5},
        "tests": {"timeoutSeconds": 90},
    }


@pytest.fixture(scope="session")
def receipt() -> list[dict[str, str]]:
    """The rows of the receipt log."""
    if not RECEIPT.exists():
        missing(f"the receipt log is not at ../shared/data/{RECEIPT.name}")
    with RECEIPT.open(newline="") as file:
        return list(csv.DictReader(file))


def job(namespace: Namespace, name: str, arguments: list[str], image: dict[str, str], **more: Any) -> Document:
    """A Job with the sidecar that the installation's notes tell to paste."""
    context = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    main = {
        "name": "main",
        "image": f"{image['registry']}/{image['repository']}:{image['tag']}",
        "args": arguments,
        "securityContext": context,
        "volumeMounts": [{"name": "files", "mountPath": "/files"}, {"name": "tmp", "mountPath": "/tmp"}],
    }
    spec = {
        "restartPolicy": "Never",
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "initContainers": [sidecar(namespace)],
        "containers": [main],
        "volumes": [{"name": "files", "configMap": {"name": name}}, {"name": "tmp", "emptyDir": {}}],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": namespace.name},
        "spec": {"backoffLimit": 0, "template": {"spec": spec | more}},
    }


def sidecar(namespace: Namespace) -> Document:
    """What the notes of the release show under `initContainers`."""
    notes = Namespace("eventprojector-e2e").helm("get", "notes", "es")
    start = notes.index("     initContainers:\n")
    [container] = yaml.safe_load(notes[start : notes.index("   In another namespace")])["initContainers"]
    assert isinstance(container, dict)
    return container


def config_map(namespace: Namespace, name: str, **files: bytes) -> Document:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": namespace.name},
        "binaryData": {file: base64.b64encode(content).decode() for file, content in files.items()},
    }


def conditions(resource: Document) -> dict[str, str]:
    return {each["type"]: each["status"] for each in resource.get("status", {}).get("conditions", [])}


def wait_ready(namespace: Namespace, *projections: str) -> None:
    """Waits until Projections are Ready for the specs that they have, without lag."""

    def is_ready(name: str) -> bool:
        found = namespace.get("projection", name)
        status = found.get("status", {})
        current = bool(status.get("observedGeneration") == found["metadata"]["generation"])
        return current and conditions(found).get("Ready") == "True" and status.get("lagSeconds") == 0

    for name in projections:
        eventually(f"{name} is ready", partial(is_ready, name))


def test_an_embedded_mongodb_is_a_replica_set_of_one(namespace: Namespace, image: dict[str, str]) -> None:
    embedded = {"enabled": True, "persistence": {"enabled": False}}
    off = {name: {"enabled": False} for name in ("projector", "operator", "crds")}
    namespace.helm(
        "install",
        "mongo",
        CHART,
        "--wait",
        "--timeout=180s",
        values={"image": image, "mongodb": {"embedded": embedded}, **off},
    )
    with namespace.mongodb(MONGOD) as client:
        hello = client.admin.command("hello")
    assert hello["isWritablePrimary"]
    assert hello["setName"] == "rs0"


def test_the_event_store_installs_and_its_own_test_passes(namespace: Namespace, values: dict[str, Any]) -> None:
    namespace.helm("install", "es", CHART, "--wait", "--timeout=180s", values=values)
    namespace.helm("test", "es", "--timeout=180s")
    assert namespace.get("projections") == [], "the test's own read model goes with it"
    with namespace.mongodb(MONGOD) as client:
        assert not [name for name in client["eventstore"].list_collection_names() if name.startswith("es-")]


def test_a_job_appends_a_log_through_its_sidecar_and_completes(
    namespace: Namespace, image: dict[str, str], receipt: list[dict[str, str]]
) -> None:
    log = gzip.compress(RECEIPT.read_bytes(), mtime=0)
    command = "gunzip --stdout /files/receipt.csv.gz >/tmp/receipt.csv && appender import /tmp/receipt.csv"
    namespace.apply(
        config_map(namespace, "import", **{"receipt.csv.gz": log}),
        job(namespace, "import", ["sh", "-c", command], image),
    )
    namespace.job_done("import")
    with namespace.mongodb(MONGOD) as client:
        stored = collections.defaultdict(list)
        for event in (
            client["eventstore"]["events"]
            .find({"aggregateId": {"$regex": "^case-"}})
            .sort([("aggregateId", 1), ("sequenceNo", 1)])
        ):
            stored[event["aggregateId"]].append((event["sequenceNo"], event["eventName"]))
    expected: dict[str, list[tuple[int, str]]] = collections.defaultdict(list)
    for row in receipt:
        case = expected[row["case:concept:name"]]
        case.append((len(case) + 1, row["concept:name"]))
    assert stored == expected


def test_projections_build_their_read_models_from_history(namespace: Namespace, receipt: list[dict[str, str]]) -> None:
    namespace.kubectl("apply", "-f", str(EXAMPLES / "projections.yaml"))
    wait_ready(namespace, "permits", "groups")
    with namespace.mongodb(MONGOD) as client:
        database = client["eventstore"]
        permits = {each.pop("_id"): each for each in database["permits"].find({"_id": {"$regex": "^case-"}})}
        groups = {each.pop("_id"): each for each in database["groups"].find()}
        assert "status_lastAt" in database["permits.v1"].index_information()
        assert "events" in database["groups.v1"].index_information()
    assert permits == permits_of(receipt)
    assert groups == groups_of(receipt)


def test_kubectl_shows_what_on_call_people_ask_first(namespace: Namespace) -> None:
    header, *rows = namespace.kubectl("get", "projections").splitlines()
    assert header.split() == ["NAME", "READY", "REASON", "LAG", "PARKED", "VERSION", "AGE"]
    for row, name in zip(rows, ("groups", "permits"), strict=True):
        assert row.split()[:-1] == [name, "True", "Live", "0", "0", "1"]


def moment(row: dict[str, str]) -> datetime.datetime:
    """A row's timestamp as MongoDB keeps it: milliseconds, UTC."""
    exact = datetime.datetime.fromisoformat(row["time:timestamp"]).astimezone(datetime.UTC)
    return exact.replace(microsecond=exact.microsecond // 1000 * 1000)


def permits_of(rows: list[dict[str, str]]) -> dict[str, Document]:
    """The read model `permits`, folded from the file."""
    documents: dict[str, Document] = {}
    for row in rows:
        permit = documents.setdefault(row["case:concept:name"], {"status": "received", "events": 0, "resources": []})
        permit["events"] += 1
        permit["lastEvent"] = row["concept:name"]
        permit["lastAt"] = max(permit.get("lastAt", moment(row)), moment(row))
        if row["org:resource"] not in permit["resources"]:
            permit["resources"].append(row["org:resource"])
        if row["concept:name"] == "Confirmation of receipt":
            permit |= {"status": "confirmed", "confirmedAt": moment(row)}
    return documents


def groups_of(rows: list[dict[str, str]]) -> dict[str, Document]:
    """The read model `groups`, folded from the file."""
    documents: dict[str, Document] = {}
    for row in rows:
        at = moment(row)
        group = documents.setdefault(row["org:group"], {"events": 0, "firstAt": at, "lastAt": at})
        group["events"] += 1
        group["firstAt"] = min(group["firstAt"], at)
        group["lastAt"] = max(group["lastAt"], at)
    return documents


def test_an_index_dropped_by_hand_comes_back(namespace: Namespace) -> None:
    with namespace.mongodb(MONGOD) as client:
        collection = client["eventstore"]["permits.v1"]
        collection.drop_index("status_lastAt")
        eventually("the index is back", lambda: "status_lastAt" in collection.index_information(), 60)
    wait_ready(namespace, "permits")


def test_nothing_is_lost_when_pods_die_and_replicas_change_under_load(
    namespace: Namespace, image: dict[str, str]
) -> None:
    """Projector killed twice, operator once, mongod once; one replica, three, one."""
    script = (Path(__file__).parent / "load.py").read_bytes()
    namespace.apply(
        config_map(namespace, "load", **{"load.py": script}),
        job(namespace, "load", ["python", "/files/load.py", "load", "100", "40"], image),
    )
    with namespace.mongodb(MONGOD) as client:
        loaded = client["eventstore"]["events"]
        eventually("the load has begun", lambda: loaded.count_documents({"eventName": "Loaded"}, limit=50) == 50)

    [projector] = namespace.pods("projector")
    namespace.kubectl("delete", "pod", projector, "--wait=false")
    [operator] = namespace.pods("operator")
    namespace.kubectl("delete", "pod", operator, "--wait=false")
    namespace.rolled_out("es-eventprojector-projector")
    [projector] = namespace.pods("projector")
    namespace.kubectl("delete", "pod", projector, "--grace-period=0", "--force")
    namespace.rolled_out("es-eventprojector-projector")
    namespace.kubectl("exec", MONGOD, "-c", "mongod", "--", "sh", "-c", "kill -TERM 1")
    eventually("mongod is back", lambda: restarted(namespace.get("pod", MONGOD)))

    namespace.kubectl("scale", "deployment", "es-eventprojector-projector", "--replicas=3")
    namespace.rolled_out("es-eventprojector-projector")
    with namespace.mongodb(MONGOD) as client:
        database = client["eventstore"]
        eventually("three pods share the partitions", lambda: len(owners(database)) == 3)
        namespace.kubectl("scale", "deployment", "es-eventprojector-projector", "--replicas=1")
        eventually("one pod has them all", lambda: len(owners(database)) == 1)

        result = json.loads(namespace.job_done("load").splitlines()[-1])
        namespace.rolled_out("es-eventprojector-operator")
        names = (each["aggregateId"] for each in database["events"].find({"eventName": "Loaded"}, {"aggregateId": 1}))
        log = collections.Counter(names)
        assert (log.total(), len(log)) == (result["events"], result["aggregates"])

        def permits() -> dict[str, int]:
            return {each["_id"]: each["events"] for each in database["permits"].find({"_id": {"$regex": "^load-"}})}

        eventually("the read model has caught up", lambda: sum(permits().values()) >= result["events"])
        wait_ready(namespace, "permits", "groups")
        assert permits() == log
        for name in ("permits", "groups"):  # all marks with all heads, all documents with a fresh fold of the log
            namespace.kubectl("exec", "deployment/es-eventprojector-projector", "--", "projector", "verify", name)
        [group] = database["groups"].find({"_id": "load"})
        assert group["events"] == result["events"]


def restarted(pod: Document) -> bool:
    """Whether mongod was started anew and all of its pod is ready."""
    statuses = pod["status"]["containerStatuses"]
    return all(each["ready"] for each in statuses) and any(each["restartCount"] for each in statuses)


def owners(database: Any) -> set[str]:
    """The replicas that hold a lease which has not expired."""
    leases = database["projector.leases"].find({"$expr": {"$gt": ["$expiresAt", "$$NOW"]}})
    return {lease["owner"] for lease in leases}


def test_an_upgrade_with_changed_values_takes_effect(namespace: Namespace, values: dict[str, Any]) -> None:
    appender = {"deployment": {"enabled": True, "replicas": 1, "auth": {"token": TOKEN}}}
    changed = values | {
        "log": {"level": "debug"},
        "injector": {"enabled": True},
        "projector": {"replicas": 2},
        "appender": appender,
    }
    namespace.helm("upgrade", "es", CHART, "--wait", "--timeout=180s", values=changed)
    assert len(namespace.pods("projector")) == 2
    [container] = namespace.get("deployment", "es-eventprojector-projector")["spec"]["template"]["spec"]["containers"]
    assert {"name": "LOG_LEVEL", "value": "debug"} in container["env"]
    namespace.helm("test", "es", "--timeout=180s")
    wait_ready(namespace, "permits", "groups")


def test_the_appender_as_a_service_wants_a_token(namespace: Namespace) -> None:
    body = json.dumps({"events": [{"eventId": "by-service", "eventName": "Posted", "payload": {}}]}).encode()

    def post(port: int, **headers: str) -> int:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/aggregates/posted/events", body, headers)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code

    with namespace.forwarded("service/es-eventprojector-appender", 8080) as port:
        assert post(port) == 401
        assert post(port, Authorization="Bearer wrong") == 401
        assert post(port, Authorization=f"Bearer {TOKEN}") == 201
        assert post(port, Authorization=f"Bearer {TOKEN}") == 200  # it was there already


def test_the_injector_s_certificate_outlives_an_upgrade(namespace: Namespace) -> None:
    before = namespace.get("secret", "es-eventprojector-injector")["data"]
    namespace.helm("upgrade", "es", CHART, "--reuse-values", "--wait", "--timeout=180s")
    assert namespace.get("secret", "es-eventprojector-injector")["data"] == before


def test_the_injector_gives_an_annotated_pod_the_sidecar(namespace: Namespace, image: dict[str, str]) -> None:
    shop = Namespace(OTHER_NAMESPACE)
    secret = namespace.get("secret", SECRET)
    shop.apply({key: secret[key] for key in ("apiVersion", "kind", "type", "data")} | {"metadata": {"name": SECRET}})
    script = (Path(__file__).parent / "load.py").read_bytes()
    annotated = job(shop, "injected", ["python", "/files/load.py", "injected", "2", "1"], image)
    del annotated["spec"]["template"]["spec"]["initContainers"]
    annotated["spec"]["template"]["metadata"] = {
        "annotations": {"eventprojector.io/inject": "true", "eventprojector.io/cpu-request": "10m"}
    }
    shop.apply(config_map(shop, "injected", **{"load.py": script}), annotated)
    assert json.loads(shop.job_done("injected").splitlines()[-1])["events"] > 0
    [pod] = shop.get("pods", "-l", "job-name=injected")
    [container] = pod["spec"]["initContainers"]
    assert container["name"] == "appender"
    assert container["resources"]["requests"]["cpu"] == "10m"


def test_an_uninstall_leaves_resources_and_data(namespace: Namespace, values: dict[str, Any]) -> None:
    namespace.helm("uninstall", "es", "--wait", "--timeout=120s")
    assert namespace.get("deployments") == []
    assert sorted(each["metadata"]["name"] for each in namespace.get("projections")) == ["groups", "permits"]
    with namespace.mongodb(MONGOD) as client:
        database = client["eventstore"]
        events = database["events"].count_documents({})
        permits = {each["_id"]: each for each in database["permits"].find()}
        assert events >= 8_577
        assert len(permits) >= 1_434

        namespace.helm("install", "es", CHART, "--wait", "--timeout=180s", values=values)
        wait_ready(namespace, "permits", "groups")
        assert database["events"].count_documents({}) == events
        assert {each["_id"]: each for each in database["permits"].find()} == permits


def test_a_deleted_projection_leaves_its_read_model_unless_told_otherwise(namespace: Namespace) -> None:
    namespace.kubectl("patch", "projection", "groups", "--type=merge", "-p", '{"spec":{"deletionPolicy":"Delete"}}')
    wait_ready(namespace, "groups")
    namespace.kubectl("delete", "projection", "groups", "permits", "--timeout=90s")
    with namespace.mongodb(MONGOD) as client:

        def collections_there() -> set[str]:
            return {
                name for name in client["eventstore"].list_collection_names() if name.startswith(("groups", "permits"))
            }

        eventually(
            "the read model of groups is gone",
            lambda: not any(name.startswith("groups") for name in collections_there()),
        )
        assert {"permits", "permits.v1"} <= collections_there()
