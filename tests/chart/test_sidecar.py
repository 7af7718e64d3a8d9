"""The appender as a native sidecar: by the named template, the injector, the example and the notes, always the same."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest
import yaml

from tests.chart.matrix import MATRIX, URI
from tests.chart.rendering import CHART, EMBEDDED, KUBERNETES, ROOT, Helm, Manifest, Render, environment, find, pods

if TYPE_CHECKING:
    from pathlib import Path

SERVICE = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: orders}
spec:
  selector: {matchLabels: {app: orders}}
  template:
    metadata: {labels: {app: orders}}
    spec:
      initContainers:
        {{- include "eventprojector.appender.sidecar" .Subcharts.eventprojector | nindent 8 }}
      containers:
        - {name: orders, image: "orders:1"}
"""


def sidecar(manifests: list[Manifest]) -> Manifest:
    """The sidecar of the test pod, which the named template makes."""
    [container] = find(manifests, "Pod", f"{fullname(manifests)}-test")["spec"]["initContainers"]
    return container


def fullname(manifests: list[Manifest]) -> str:
    [name] = [each["metadata"]["name"] for each in manifests if each["kind"] == "Pod"]
    return str(name).removesuffix("-test")


@pytest.mark.parametrize("name", MATRIX)
def test_it_is_safe_in_anybody_s_pod(name: str, render: Render) -> None:
    """It starts before the service and ends after it, is reachable on loopback alone, and needs nothing of its pod."""
    container = sidecar(
        render(MATRIX[name], apis=("monitoring.coreos.com/v1/PodMonitor", "monitoring.coreos.com/v1/PrometheusRule"))
    )
    assert container["restartPolicy"] == "Always"
    assert environment(container)["APPENDER_HOST"] == "127.0.0.1"
    assert "volumeMounts" not in container
    context = container["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] == 65532
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["resources"]["requests"]


ALONE = {name: {"enabled": False} for name in ("projector", "operator", "crds")}


@pytest.mark.parametrize(
    ("values", "deployments"), [({}, 3), (ALONE, 1)], ids=["an event store of its own", "the sidecar alone"]
)
def test_a_chart_of_the_user_s_can_include_it(
    values: dict[str, Any], deployments: int, tmp_path: Path, run_helm: Helm
) -> None:
    shop = tmp_path / "shop"
    (shop / "templates").mkdir(parents=True)
    (shop / "Chart.yaml").write_text(
        "apiVersion: v2\nname: shop\nversion: 1.0.0\ndependencies: [{name: eventprojector, version: 0.1.0}]\n"
    )
    (shop / "templates" / "orders.yaml").write_text(SERVICE)
    shutil.copytree(CHART, shop / "charts" / "eventprojector")
    ours = values | {"mongodb": {"existingSecret": {"name": "mongo"}}, "appender": {"port": 9000}}
    text = run_helm(
        "template", "shop", str(shop), "--kube-version", KUBERNETES, values={"global": {"a": 1}, "eventprojector": ours}
    )
    manifests = [each for each in yaml.safe_load_all(text) if each]
    orders = find(manifests, "Deployment", "orders")
    kubernetes_validate.validate(orders, KUBERNETES, strict=True)
    [container] = orders["spec"]["template"]["spec"]["initContainers"]
    assert environment(container)["APPENDER_PORT"] == "9000"
    assert environment(container)["MONGODB_URI"] == {"secretKeyRef": {"name": "mongo", "key": "uri"}}
    assert len([each for each in manifests if each["kind"] == "Deployment"]) == deployments


def test_somebody_makes_the_log(render: Render) -> None:
    """The projector where there is one; else the appender itself, which then needs the right to."""

    def provisions(values: dict[str, Any]) -> str:
        found: str = environment(sidecar(render(values)))["EVENTSTORE_PROVISION"]
        return found

    assert provisions({}) == "false"
    [projector] = pods(render())["Deployment shop-eventprojector-projector"]["containers"]
    assert environment(projector)["EVENTSTORE_PROVISION"] == "true"
    assert provisions({"projector": {"enabled": False}}) == "true"
    assert provisions({"projector": {"replicas": 0}}) == "true"


def test_the_example_is_what_the_chart_makes(run_helm: Helm) -> None:
    text = run_helm("template", "eventprojector", str(CHART), "--kube-version", KUBERNETES, values=EMBEDDED)
    container = sidecar([each for each in yaml.safe_load_all(text) if each])
    example = yaml.safe_load((ROOT / "examples" / "kubernetes" / "deployment.yaml").read_text())
    kubernetes_validate.validate(example, KUBERNETES, strict=True)
    assert example["spec"]["template"]["spec"]["initContainers"] == [container]


def test_the_page_to_install_shows_what_the_chart_makes(run_helm: Helm) -> None:
    text = run_helm("template", "eventprojector", str(CHART), "--kube-version", KUBERNETES, values=EMBEDDED)
    container = sidecar([each for each in yaml.safe_load_all(text) if each])
    page = (ROOT / "docs" / "how-to" / "install.md").read_text()
    start = page.index("    initContainers:\n      - name: appender")
    assert yaml.safe_load(page[start : page.index("    ```", start)])["initContainers"] == [container]


def test_the_injector_makes_the_same(render: Render) -> None:
    """What the operator's settings from the chart make of an annotated pod is the container of the named template."""
    from projector.operator.injector import inject
    from projector.operator.settings import InjectorSettings

    values = {
        "injector": {"enabled": True},
        "mongodb": {"existingSecret": {"name": "mongo"}},
        "appender": {"resources": None},
    }
    manifests = render(values)
    [operator] = pods(manifests)["Deployment shop-eventprojector-operator"]["containers"]
    variables = {name: value for name, value in environment(operator).items() if name.startswith("INJECTOR_")}
    settings = InjectorSettings(**{name.removeprefix("INJECTOR_").lower(): value for name, value in variables.items()})
    pod = {"metadata": {"annotations": {"eventprojector.io/inject": "true"}}, "spec": {"containers": []}}
    injected = inject(pod, settings)
    assert injected is not None
    [container] = injected["spec"]["initContainers"]
    expected = sidecar(manifests)
    # The defaults of the image, which an annotation may change.
    expected["env"] = [each for each in expected["env"] if each["name"] not in {"LOG_LEVEL", "LOG_FORMAT"}]
    assert plain(container) == plain(expected)


def plain(container: Manifest) -> Manifest:
    """With ports by number, in which the two may differ."""
    container = {key: value for key, value in container.items() if key != "env"} | {"env": environment(container)}
    [port] = container["ports"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        container[probe]["httpGet"]["port"] = port["containerPort"]
    return container


def test_the_injector_s_webhook_is_asked_for_annotated_pods_alone(render: Render) -> None:
    from projector.operator.injector import application
    from projector.operator.metrics import Metrics
    from projector.operator.settings import InjectorSettings

    manifests = render(MATRIX["the injector"])
    configuration = find(manifests, "MutatingWebhookConfiguration", "shop-eventprojector-injector-shop")
    [webhook] = configuration["webhooks"]
    assert webhook["failurePolicy"] == "Ignore"
    assert webhook["sideEffects"] == "None"
    [rule] = webhook["rules"]
    assert (rule["operations"], rule["resources"]) == (["CREATE"], ["pods"])
    [condition] = webhook["matchConditions"]
    assert "eventprojector.io/inject" in condition["expression"]
    [excluded] = webhook["namespaceSelector"]["matchExpressions"]
    assert {"kube-system", "shop"} <= set(excluded["values"])
    service = find(manifests, "Service", webhook["clientConfig"]["service"]["name"])
    assert webhook["clientConfig"]["service"]["namespace"] == service["metadata"]["namespace"]
    app = application(InjectorSettings(), Metrics(()))
    assert webhook["clientConfig"]["service"]["path"] in {
        route.resource.canonical for route in app.router.routes() if route.resource
    }


def test_the_injector_s_certificate_fits_its_service(render: Render) -> None:
    from base64 import b64decode

    manifests = render(MATRIX["the injector"])
    secret = find(manifests, "Secret", "shop-eventprojector-injector")
    [webhook] = find(manifests, "MutatingWebhookConfiguration", "shop-eventprojector-injector-shop")["webhooks"]
    assert webhook["clientConfig"]["caBundle"] == secret["data"]["ca.crt"]
    assert b64decode(secret["data"]["tls.key"]).startswith(b"-----BEGIN")
    spec = pods(manifests)["Deployment shop-eventprojector-operator"]
    [volume] = [each for each in spec["volumes"] if each["name"] == "injector-certificate"]
    assert volume["secret"]["secretName"] == "shop-eventprojector-injector"
    by_cert_manager = render(MATRIX["the injector by cert-manager"])
    certificate = find(by_cert_manager, "Certificate", "shop-eventprojector-injector")
    assert certificate["spec"]["dnsNames"] == ["shop-eventprojector-injector.shop.svc"]
    assert certificate["spec"]["secretName"] == "shop-eventprojector-injector"


@pytest.fixture(scope="session")
def notes(run_helm: Helm, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """NOTES.txt as an install prints it; Helm renders it without a cluster only as some other template."""
    chart = tmp_path_factory.mktemp("chart") / "eventprojector"
    shutil.copytree(CHART, chart)
    (chart / "files" / "NOTES.txt").write_text((CHART / "templates" / "NOTES.txt").read_text())
    (chart / "templates" / "zz.yaml").write_text('notes: {{ tpl (.Files.Get "files/NOTES.txt") . | toJson }}\n')

    def render_notes(values: dict[str, Any]) -> str:
        text = run_helm(
            "template",
            "shop",
            str(chart),
            "--kube-version",
            KUBERNETES,
            "--show-only",
            "templates/zz.yaml",
            values=values,
        )
        return str(yaml.safe_load(text)["notes"])

    return render_notes


def test_the_notes_hold_the_manifest_and_the_warnings(notes: Any, render: Render) -> None:
    text = notes(EMBEDDED)
    start = text.index("     initContainers:\n")
    manifest = yaml.safe_load(text[start : text.index("   In another namespace")])
    assert manifest["initContainers"] == [sidecar(render(EMBEDDED))]
    assert "helm test shop" in text
    start = text.index("     apiVersion: eventprojector.io")
    example = yaml.safe_load(text[start : text.index("     END")])
    assert example["kind"] == "Projection"
    assert "WARNING: mongodb.embedded is one mongod without a password" in text
    calm = notes({"mongodb": {"uri": URI}})
    assert "WARNING" not in calm
    assert "hunter2" not in calm


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        ({"operator": {"enabled": False}}, "runs no operator"),
        ({"crds": {"enabled": False}}, "lacks the custom resource definitions"),
        ({"injector": {"enabled": True, "failurePolicy": "Fail"}}, "annotated pods cannot start"),
        ({"monitoring": {"podMonitor": {"enabled": True, "renderMode": "skipIfMissing"}}}, "no PodMonitor was made"),
    ],
)
def test_the_notes_warn(values: dict[str, Any], warning: str, notes: Any) -> None:
    assert warning in notes({"mongodb": {"uri": URI}} | values)
