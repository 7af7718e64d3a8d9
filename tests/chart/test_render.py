"""Every template under a matrix of values: valid for Kubernetes, safe, and what the values say."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate.utils import SchemaNotFoundError

from tests.chart.matrix import MATRIX, MONITORING, TOKEN, URI
from tests.chart.rendering import (
    CHART,
    EMBEDDED,
    KUBERNETES,
    Helm,
    Manifest,
    Render,
    RenderError,
    environment,
    find,
    pods,
)

Case: TypeAlias = Callable[[str], list[Manifest]]

FOREIGN = {"PodMonitor", "PrometheusRule", "Issuer", "Certificate"}
"""Kinds of other projects, whose schemas are not at hand."""


@pytest.fixture(scope="session")
def case(render: Render) -> Case:
    """The manifests of a case of the matrix, rendered once."""
    rendered: dict[str, list[Manifest]] = {}

    def get(name: str) -> list[Manifest]:
        if name not in rendered:
            rendered[name] = render(MATRIX[name], apis=MONITORING)
        return rendered[name]

    return get


def check_custom_resource(manifest: Manifest) -> None:
    """Against the CRD that the chart ships."""
    for path in (CHART / "files" / "crds").glob("*.yaml"):
        crd = yaml.safe_load(path.read_text())
        if crd["spec"]["names"]["kind"] == manifest["kind"]:
            [version] = crd["spec"]["versions"]
            jsonschema.validate(manifest, version["schema"]["openAPIV3Schema"])
            return
    pytest.fail(f"no CRD of {manifest['kind']}")


@pytest.mark.parametrize("name", MATRIX)
def test_manifests_are_valid(name: str, case: Case) -> None:
    manifests = case(name)
    assert manifests
    for manifest in manifests:
        if manifest["apiVersion"].startswith("eventprojector.io/"):
            check_custom_resource(manifest)
        elif manifest["kind"] not in FOREIGN:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    identities = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in manifests]
    assert len(set(identities)) == len(identities)


@pytest.mark.parametrize("name", ["a trial", "all plumbing", "the injector"])
def test_manifests_are_valid_for_the_oldest_kubernetes(name: str, render: Render) -> None:
    for manifest in render(MATRIX[name], version="1.29.0"):
        if not manifest["apiVersion"].startswith("eventprojector.io/"):
            kubernetes_validate.validate(manifest, "1.29.0", strict=True)


def test_an_older_kubernetes_is_refused(render: Render) -> None:
    with pytest.raises(RenderError, match=r"kubeVersion: >=1\.29"):
        render(version="1.28.0")


def test_the_validation_would_notice(case: Case) -> None:
    """A field that Kubernetes does not know, and a kind that nobody knows."""
    deployment = find(case("a trial"), "Deployment", "shop-eventprojector-projector")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            deployment | {"spec": deployment["spec"] | {"replica": 1}}, KUBERNETES, strict=True
        )
    with pytest.raises(SchemaNotFoundError):
        kubernetes_validate.validate(deployment | {"kind": "Deploymend"}, KUBERNETES, strict=True)


def test_the_matrix_reaches_every_template(run_helm: Helm) -> None:
    sources: set[str] = set()
    for values in MATRIX.values():
        apis = [f"--api-versions={api}" for api in MONITORING]
        text = run_helm("template", "shop", str(CHART), "--kube-version", KUBERNETES, *apis, values=EMBEDDED | values)
        sources |= set(re.findall(r"^# Source: eventprojector/(.*)$", text, re.MULTILINE))
    templates = {str(path.relative_to(CHART)) for path in (CHART / "templates").rglob("*.yaml")}
    # This one makes something of each file of a folder; test_monitoring gives it files.
    assert sources | {"templates/monitoring/dashboards.yaml"} == templates


def own_containers(spec: Manifest) -> list[Manifest]:
    """The chart's own containers: not those that the user added."""
    containers = [*spec.get("initContainers", []), *spec["containers"]]
    return [each for each in containers if each["name"] not in {"beside", "before"}]


@pytest.mark.parametrize("name", MATRIX)
def test_every_pod_is_restricted(name: str, case: Case) -> None:
    """The Pod Security Standard `restricted`, and a read-only root besides."""
    specs = pods(case(name))
    assert specs
    for where, spec in specs.items():
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), where
        assert spec["enableServiceLinks"] is False, where
        for volume in spec.get("volumes", []):
            assert volume.keys() - {"name"} <= {"configMap", "secret", "emptyDir"}, where
        for container in own_containers(spec):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, where
            assert context["capabilities"] == {"drop": ["ALL"]}, where
            assert context["readOnlyRootFilesystem"] is True, where
            assert not any("hostPort" in port for port in container.get("ports", [])), where


@pytest.mark.parametrize("name", MATRIX)
def test_only_the_operator_gets_a_token(name: str, case: Case) -> None:
    for where, spec in pods(case(name)).items():
        assert spec["automountServiceAccountToken"] is where.endswith("-operator"), where
    for manifest in case(name):
        if manifest["kind"] == "ServiceAccount":
            assert manifest["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", MATRIX)
def test_secrets_are_in_secrets_alone(name: str, case: Case) -> None:
    for manifest in case(name):
        if manifest["kind"] != "Secret":
            text = yaml.safe_dump(manifest)
            assert URI not in text
            assert "hunter2" not in text
            assert TOKEN not in text
            assert "PRIVATE KEY" not in text


def test_secrets_are_where_they_should_be(case: Case) -> None:
    manifests = case("all plumbing")
    assert find(manifests, "Secret", "events-mongodb")["stringData"] == {"uri": URI}
    for component in ("appender", "projector"):
        assert find(manifests, "Secret", f"events-{component}-token")["stringData"] == {"token": TOKEN}
    assert [each for each in case("a Secret") if each["kind"] == "Secret"] == []


@pytest.mark.parametrize("name", MATRIX)
def test_labels(name: str, case: Case) -> None:
    """Recommended labels on all objects; selectors without what changes, and found on the pods they mean."""
    manifests = case(name)
    templates = [
        each["spec"]["template"]["metadata"]["labels"]
        for each in manifests
        if each["kind"] in {"Deployment", "StatefulSet"}
    ]
    for manifest in manifests:
        if manifest["metadata"]["name"] in {"shop-map", "shop-text"}:
            continue  # the user's own
        labels = manifest["metadata"]["labels"]
        assert {
            "app.kubernetes.io/name",
            "app.kubernetes.io/instance",
            "app.kubernetes.io/version",
            "helm.sh/chart",
        } <= labels.keys()
        assert MATRIX[name].get("commonLabels", {}).items() <= labels.items()
        selector = manifest.get("spec", {}).get("selector") or {}
        selector = selector.get("matchLabels", selector) if "matchExpressions" not in selector else {}
        if selector and manifest["kind"] not in {"PodMonitor", "Certificate"}:
            assert not {"helm.sh/chart", "app.kubernetes.io/version"} & selector.keys()
            assert sum(selector.items() <= template.items() for template in templates) == 1, manifest["metadata"][
                "name"
            ]


def test_mongodb_comes_from_the_component_s_secret_then_from_the_common_one(
    case: Case,
) -> None:
    def source(manifests: list[Manifest], component: str) -> dict[str, str]:
        [container] = find(manifests, "Deployment", f"shop-eventprojector-{component}")["spec"]["template"]["spec"][
            "containers"
        ]
        found: dict[str, str] = environment(container)["MONGODB_URI"]["secretKeyRef"]
        return found

    assert source(case("a Secret"), "projector") == {"name": "mongo", "key": "url"}
    assert source(case("a connection string"), "operator") == {"name": "shop-eventprojector-mongodb", "key": "uri"}
    for component in ("appender", "projector", "operator"):
        assert source(case("a Secret for each"), component) == {"name": f"mongo-{component}", "key": "uri"}


def test_pods_restart_when_the_chart_s_secret_or_projections_change(render: Render) -> None:
    def annotations(values: dict[str, Any], component: str) -> dict[str, str]:
        manifests = render(values)
        found: dict[str, str] = find(manifests, "Deployment", f"shop-eventprojector-{component}")["spec"]["template"][
            "metadata"
        ]["annotations"]
        return found

    one, other = ({"mongodb": {"uri": uri}} for uri in (URI, URI.replace("hunter2", "hunter3")))
    for component in ("projector", "operator"):
        assert annotations(one, component)["checksum/mongodb"] != annotations(other, component)["checksum/mongodb"]
    definitions = MATRIX["projections in a ConfigMap"]
    changed = {
        "projector": {
            "projections": {
                "source": "configMap",
                "definitions": {"permits": {"version": 2, "on": {"*": {"$inc": {"n": 1}}}}},
            }
        }
    }
    assert (
        annotations(definitions, "projector")["checksum/projections"]
        != annotations(changed, "projector")["checksum/projections"]
    )


def test_the_operator_is_one(case: Case) -> None:
    for name in MATRIX:
        for manifest in case(name):
            if manifest["kind"] == "Deployment" and manifest["metadata"]["name"].endswith("-operator"):
                assert manifest["spec"]["replicas"] == 1
                assert manifest["spec"]["strategy"] == {"type": "Recreate"}


def test_crds_are_kept(case: Case) -> None:
    crds = [each for each in case("a trial") if each["kind"] == "CustomResourceDefinition"]
    assert sorted(each["spec"]["names"]["kind"] for each in crds) == ["EventStore", "Projection"]
    assert all(each["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep" for each in crds)
    assert not [each for each in case("projections in a ConfigMap") if each["kind"] == "CustomResourceDefinition"]


RULES = [
    {
        "apiGroups": ["eventprojector.io"],
        "resources": ["eventstores", "projections"],
        "verbs": ["get", "list", "watch", "patch"],
    },
    {"apiGroups": ["eventprojector.io"], "resources": ["eventstores/status", "projections/status"], "verbs": ["patch"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["create"]},
]


@pytest.mark.parametrize(
    ("name", "kind", "namespaces", "served", "rules"),
    [
        ("a trial", "Role", ["shop"], "shop", RULES),
        (
            "an operator of two namespaces",
            "Role",
            ["a", "b"],
            "a,b",
            [*RULES, {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}],
        ),
        ("an operator of all namespaces", "ClusterRole", [None], "", RULES),
    ],
)
def test_the_operator_has_no_more_rights_than_it_needs(
    name: str,
    kind: str,
    namespaces: list[str],
    served: str,
    rules: list[Manifest],
    case: Case,
) -> None:
    roles = [each for each in case(name) if each["kind"] in {"Role", "ClusterRole"}]
    bindings = [each for each in case(name) if each["kind"] in {"RoleBinding", "ClusterRoleBinding"}]
    assert [(each["kind"], each["metadata"].get("namespace")) for each in roles] == [
        (kind, each) for each in namespaces
    ]
    assert all(each["rules"] == rules for each in roles)
    assert [each["metadata"].get("namespace") for each in bindings] == namespaces
    for binding in bindings:
        assert binding["roleRef"]["kind"] == kind
        assert binding["subjects"] == [
            {"kind": "ServiceAccount", "name": "shop-eventprojector-operator", "namespace": "shop"}
        ]
    [container] = pods(case(name))["Deployment shop-eventprojector-operator"]["containers"]
    assert environment(container)["OPERATOR_NAMESPACES"] == served


def test_topology_spread_gets_its_selector(case: Case) -> None:
    for component in ("projector", "appender"):
        filled, own = pods(case("all plumbing"))[f"Deployment events-{component}"]["topologySpreadConstraints"]
        assert filled["labelSelector"]["matchLabels"]["app.kubernetes.io/component"] == component
        assert own["labelSelector"] == {"matchLabels": {"own": "selector"}}


@pytest.mark.parametrize(
    ("name", "arguments", "mounted"),
    [
        ("a trial", ["projector", "run", "--from-database"], None),
        ("projections in a ConfigMap", ["projector", "run"], "shop-eventprojector-projections"),
        ("projections in the user's ConfigMap", ["projector", "run"], "mine"),
        ("projections in Python", ["projector", "run", "--module", "shop.projections"], None),
    ],
)
def test_where_projections_come_from(name: str, arguments: list[str], mounted: str | None, case: Case) -> None:
    spec = pods(case(name))["Deployment shop-eventprojector-projector"]
    [container] = spec["containers"]
    assert container["args"] == arguments
    maps = [volume["configMap"]["name"] for volume in spec["volumes"] if "configMap" in volume]
    assert maps == ([mounted] if mounted else [])
    folder = environment(container).get("PROJECTOR_PROJECTIONS")
    paths = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "projections"]
    assert paths == ([folder] if mounted else [])


def test_a_declared_projection_is_one_that_the_projector_reads(case: Case) -> None:
    from projector.declared import from_definition

    files = find(case("projections in a ConfigMap"), "ConfigMap", "shop-eventprojector-projections")["data"]
    assert list(files) == ["permits.yaml"]
    assert from_definition(yaml.safe_load(files["permits.yaml"])).name == "permits"


def test_the_appender_beyond_loopback_has_a_token_and_drains_in_time(case: Case) -> None:
    spec = pods(case("a Secret for each"))["Deployment shop-eventprojector-appender"]
    [container] = spec["containers"]
    variables = environment(container)
    assert variables["APPENDER_HOST"] == "0.0.0.0"
    [mount] = [each for each in container["volumeMounts"] if each["name"] == "token"]
    assert variables["APPENDER_TOKEN_FILE"] == f"{mount['mountPath']}/token"
    assert "subPath" not in mount, "a rotated Secret would not arrive"
    [volume] = [each for each in spec["volumes"] if each["name"] == "token"]
    assert volume["secret"] == {"secretName": "tokens", "items": [{"key": "all", "path": "token"}]}
    [_, seconds] = container["lifecycle"]["preStop"]["exec"]["command"]
    assert int(seconds) + int(variables["APPENDER_DRAIN_SECONDS"]) < spec["terminationGracePeriodSeconds"]


def test_the_projector_takes_orders_with_a_token_alone(case: Case) -> None:
    """Without one it is the program itself that refuses them; with one its file is where the setting says."""
    [container] = pods(case("a trial"))["Deployment shop-eventprojector-projector"]["containers"]
    assert "PROJECTOR_TOKEN_FILE" not in environment(container)
    spec = pods(case("a Secret for each"))["Deployment shop-eventprojector-projector"]
    [container] = spec["containers"]
    [mount] = [each for each in container["volumeMounts"] if each["name"] == "token"]
    assert environment(container)["PROJECTOR_TOKEN_FILE"] == f"{mount['mountPath']}/token"
    [volume] = [each for each in spec["volumes"] if each["name"] == "token"]
    assert volume["secret"] == {"secretName": "tokens", "items": [{"key": "token", "path": "token"}]}


def test_the_projector_drains_in_time(case: Case) -> None:
    spec = pods(case("a trial"))["Deployment shop-eventprojector-projector"]
    [container] = spec["containers"]
    assert int(environment(container)["PROJECTOR_DRAIN_SECONDS"]) < spec["terminationGracePeriodSeconds"]


def test_network_policies_name_ports_that_exist(case: Case) -> None:
    manifests = case("network policies")
    policies = {each["metadata"]["name"]: each for each in manifests if each["kind"] == "NetworkPolicy"}
    assert sorted(policies) == [
        f"shop-eventprojector-{component}" for component in ("appender", "mongodb", "operator", "projector")
    ]
    for workload in manifests:
        if workload["kind"] not in {"Deployment", "StatefulSet"}:
            continue
        policy = policies[workload["metadata"]["name"]]
        template = workload["spec"]["template"]
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        ports = {port["name"] for container in template["spec"]["containers"] for port in container.get("ports", [])}
        allowed = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
        assert allowed == ports
    reached = {
        port["port"] for rule in policies["shop-eventprojector-operator"]["spec"]["egress"] for port in rule["ports"]
    }
    assert reached == {53, 27017, 27018, 443, 6443, 4318}
    reached = {
        port["port"] for rule in policies["shop-eventprojector-projector"]["spec"]["egress"] for port in rule["ports"]
    }
    assert reached == {53, 27017, 27018, 4318}


def test_services_and_probes_name_ports_that_exist(case: Case) -> None:
    for name in MATRIX:
        for where, spec in pods(case(name)).items():
            for container in own_containers(spec):
                ports = {port["name"] for port in container.get("ports", [])}
                for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                    check = container.get(probe, {})
                    handler = check.get("httpGet") or check.get("tcpSocket")
                    assert handler is None or handler["port"] in ports, where
        templates = [each["spec"]["template"] for each in case(name) if each["kind"] in {"Deployment", "StatefulSet"}]
        for service in case(name):
            if service["kind"] == "Service":
                [template] = [
                    each
                    for each in templates
                    if service["spec"]["selector"].items() <= each["metadata"]["labels"].items()
                ]
                ports = {
                    port["name"] for container in template["spec"]["containers"] for port in container.get("ports", [])
                }
                assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def test_extras_go_through_tpl(case: Case) -> None:
    manifests = case("all plumbing")
    for component in ("appender", "projector", "operator"):
        spec = pods(manifests)[f"Deployment events-{component}"]
        container = spec["containers"][0]
        assert environment(container)["RELEASE"] == "shop"
        assert container["envFrom"] == [{"configMapRef": {"name": "shop-environment"}}]
        assert {"name": "extra", "configMap": {"name": "shop-extra"}} in spec["volumes"]
        assert [each["name"] for each in spec["containers"]] == [component, "beside"]
        assert [each["name"] for each in spec["initContainers"]] == ["before"]
        assert spec["hostUsers"] is False
    assert find(manifests, "ConfigMap", "shop-map")
    assert find(manifests, "ConfigMap", "shop-text")
