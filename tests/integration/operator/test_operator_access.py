"""The operator and what it may: MongoDB away, credentials and rights in MongoDB and in Kubernetes."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from pymongo import AsyncMongoClient

from eventstore.embedded import ReplicaSet
from projector.operator.reference import PRIVILEGES
from tests.conftest import missing, need_mongod
from tests.integration.operator.cluster import (
    BY_NAME,
    HOME,
    PROJECTION,
    condition,
    index_state,
    some_passes,
    store,
    until,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from eventstore.client import Database
    from tests.integration.operator.cluster import Operators, Resources


@pytest.fixture
def own_server() -> Any:
    """A MongoDB that a test may end."""
    need_mongod()
    with ReplicaSet() as replica_set:
        yield replica_set


@pytest.mark.usefixtures("impatient")
async def test_mongodb_goes_away_and_comes_back(
    operators: Operators, resources: Resources, own_server: ReplicaSet
) -> None:
    uri = own_server.uri
    [member] = own_server.members
    spec = {"database": "shop", "indexes": [BY_NAME]}
    async with operators.run(uri=uri) as operator:
        await resources.create("EventStore", "main", spec)
        await resources.until_ready("EventStore", "main")
        member.kill()
        found = await resources.until_ready("EventStore", "main", "Unknown", "MongoUnavailable")
        assert index_state(found, "by-name") == "Ready"  # what was known last
        await some_passes(operator, "EventStore")
        version = found["metadata"]["resourceVersion"]
        await some_passes(operator, "EventStore", 5)
        assert (await resources.get("EventStore", "main"))["metadata"]["resourceVersion"] == version
        member.start()
        await resources.until_ready("EventStore", "main")
        # With nothing to drop, a deletion does not wait for MongoDB; a projection's does, or it would run on.
        await resources.create("Projection", "orders", PROJECTION)
        await resources.until_ready("Projection", "orders", "Unknown", "ProjectorSilent")
        member.kill()
        await resources.until_ready("EventStore", "main", "Unknown", "MongoUnavailable")
        await resources.delete("EventStore", "main")
        await resources.until_gone("EventStore", "main")
        await resources.delete("Projection", "orders")
        await until(lambda: _has_event(resources, "DeletionWaits"))
        assert (await resources.get("Projection", "orders"))["metadata"]["deletionTimestamp"]
        member.start()
        await resources.until_gone("Projection", "orders", seconds=40)


async def _has_event(resources: Resources, reason: str) -> bool:
    return any(event["reason"] == reason for event in await resources.events())


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[str]:
    """Address of a MongoDB that asks for credentials, with users: root, `reader`, and `operator` with its documented role."""
    need_mongod()
    key = tmp_path / "key"
    key.write_text("a" * 32)
    key.chmod(0o600)
    with ReplicaSet(arguments=["--keyFile", str(key)]) as replica_set:
        address = replica_set.uri.removeprefix("mongodb://")
        async with AsyncMongoClient[dict[str, Any]](replica_set.uri) as client:
            await client.admin.command("createUser", "root", pwd="pw", roles=["root"])
        async with AsyncMongoClient[dict[str, Any]](f"mongodb://root:pw@{address}&authSource=admin") as client:
            privileges = [
                {"resource": {"db": "shop", "collection": collection}, "actions": list(actions)}
                for collection, actions in PRIVILEGES
            ]
            await client.shop.command("createRole", "operator", privileges=privileges, roles=[])
            role = {"role": "operator", "db": "shop"}
            await client.admin.command("createUser", "operator", pwd="pw", roles=[role])
            await client.admin.command("createUser", "reader", pwd="pw", roles=[{"role": "read", "db": "shop"}])
        yield f"{address}&authSource=admin"


@pytest.mark.usefixtures("impatient")
async def test_wrong_credentials_and_missing_rights(operators: Operators, resources: Resources, guarded: str) -> None:
    for user, text in (("root:wrong", "Authentication failed"), ("reader:pw", "not authorized")):
        name = user.split(":")[0]
        async with operators.run(uri=f"mongodb://{user}@{guarded}") as operator:
            await resources.create("EventStore", name, {"database": "shop", "indexes": [BY_NAME]})
            found = await resources.until_ready("EventStore", name, "False", "AccessDenied")
            assert text in condition(found, "Ready")["message"]
            assert condition(found, "Degraded")["status"] == "True"
            await some_passes(operator, "EventStore")
            again = await resources.get("EventStore", name)
            assert again["metadata"]["resourceVersion"] == found["metadata"]["resourceVersion"]
            await resources.delete("EventStore", name)
            await resources.until_gone("EventStore", name)


async def test_the_documented_rights_are_enough(
    operators: Operators, resources: Resources, guarded: str, database_name: str
) -> None:
    assert database_name
    operators.database = "shop"
    async with operators.run(uri=f"mongodb://operator:pw@{guarded}"):
        await resources.create(
            "EventStore", "main", {"database": "shop", "indexes": [BY_NAME], "deletionPolicy": "Delete"}
        )
        await resources.until_ready("EventStore", "main")
        change = {"indexes": [BY_NAME | {"hidden": True}], "allowRecreate": True}
        await resources.patch("EventStore", "main", {"spec": change})
        await resources.until_ready("EventStore", "main")
        unique = {"readModel": {"indexes": [{"keys": [{"field": "email"}], "unique": True}]}}
        async with AsyncMongoClient[dict[str, Any]](f"mongodb://root:pw@{guarded}") as client:
            await client.shop["orders.v1"].insert_many(
                [{"_id": "first", "email": "a"}, {"_id": "second", "email": "a"}]
            )
        await resources.create("Projection", "orders", PROJECTION | unique)
        found = await resources.until_ready("Projection", "orders", "False", "DuplicateKey")
        assert "first" in condition(found, "Ready")["message"]
        for kind, name in (("EventStore", "main"), ("Projection", "orders")):
            await resources.delete(kind, name)
            await resources.until_gone(kind, name)


def chart_rules() -> list[dict[str, Any]]:
    """The rules of the operator's role, as the chart renders them."""
    helm = HOME / "bin" / "helm"
    if not helm.is_file():
        missing("there is no helm among the cluster's programs")
    command = [str(helm), "template", "test", str(Path(__file__).parents[3] / "deploy" / "helm"), "--namespace", "x"]
    command += ["--show-only", "templates/operator/rbac.yaml", "--set", "operator.rbac.secrets=true"]
    command += ["--set", "mongodb.uri=mongodb://nowhere/", "--kube-version", "1.34.0"]
    rendered = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert rendered.returncode == 0, rendered.stderr
    [role] = [one for one in yaml.safe_load_all(rendered.stdout) if one and one["kind"] == "Role"]
    rules: list[dict[str, Any]] = role["rules"]
    return rules


async def test_the_charts_role_is_enough(
    operators: Operators,
    resources: Resources,
    empty: Database,
    mongodb_uri: str,
    kubeconfig: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    api, namespace = resources.api, resources.namespace
    core, rbac = f"/api/v1/namespaces/{namespace}", f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    name = {"metadata": {"name": "operator"}}
    await api.call("POST", f"{core}/serviceaccounts", name)
    await api.call("POST", f"{rbac}/roles", name | {"rules": chart_rules()})
    subject = {"kind": "ServiceAccount", "name": "operator", "namespace": namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "operator"}
    await api.call("POST", f"{rbac}/rolebindings", name | {"subjects": [subject], "roleRef": role})
    answer = await api.call("POST", f"{core}/serviceaccounts/operator/token", {"spec": {}})
    config = yaml.safe_load(kubeconfig.read_text())
    config["users"][0]["user"] = {"token": answer["status"]["token"]}
    own = tmp_path / "kubeconfig"
    own.write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(own))
    uri = base64.b64encode(mongodb_uri.encode()).decode()
    await api.call("POST", f"{core}/secrets", {"metadata": {"name": "mongodb"}, "data": {"uri": uri}})
    async with operators.run():
        await resources.create("EventStore", "main", store(empty, connection={"secretRef": {"name": "mongodb"}}))
        await resources.until_ready("EventStore", "main")
        await until(lambda: _has_event(resources, "Reconciled"))
        await resources.delete("EventStore", "main")
        await resources.until_gone("EventStore", "main")
    assert "forbidden" not in caplog.text.lower()
