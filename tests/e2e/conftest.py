"""A real cluster, by KUBECONFIG, and the image that it can run, by IMAGE: `make e2e` sets both.

The scenario is one story in the order of its file, for an installation is what the next step stands on.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.conftest import missing
from tests.e2e.cluster import CommandError, Namespace, eventually, run

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
NAMESPACE = "eventprojector-e2e"
OTHER_NAMESPACE = "eventprojector-e2e-shop"
CRDS = ("eventstores.eventprojector.io", "projections.eventprojector.io")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the order of the file, whatever shuffled them."""
    ours = iter(sorted((item for item in items if item.get_closest_marker("e2e")), key=lambda item: item.location[:2]))
    items[:] = [next(ours) if item.get_closest_marker("e2e") else item for item in items]


@pytest.fixture(scope="session")
def image() -> dict[str, str]:
    """The image as the chart's values."""
    reference = os.environ.get("IMAGE") or missing("IMAGE is not set: run make e2e")
    path, _, tag = reference.rpartition(":")
    registry, _, repository = path.partition("/")
    return {"registry": registry, "repository": repository, "tag": tag}


@pytest.fixture(scope="session")
def namespace() -> Iterator[Namespace]:
    """An empty namespace that lets in only what is `restricted`, in a cluster that has none of our definitions."""
    if "KUBECONFIG" not in os.environ:
        missing("KUBECONFIG is not set: run make e2e")
    for program in ("kubectl", "helm"):
        if shutil.which(program) is None:
            missing(f"there is no {program} on PATH")
    clean_up()
    if left := run("kubectl", "get", "crd", *CRDS, "--ignore-not-found", "-o", "name"):
        pytest.fail(
            f"the cluster has definitions of ours that this test did not make, and it is no place for it: {left}"
        )
    for name in (NAMESPACE, OTHER_NAMESPACE):
        labels = {"eventprojector.io/e2e": "true", "pod-security.kubernetes.io/enforce": "restricted"}
        manifest = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
        run("kubectl", "apply", "-f", "-", stdin=yaml.safe_dump(manifest))
        account = partial(
            Namespace(name).kubectl, "get", "serviceaccount", "default", "--ignore-not-found", "-o", "name"
        )
        eventually("the namespace has its account", account)
    yield Namespace(NAMESPACE)
    clean_up()


def clean_up() -> None:
    """Removes what this test makes: its namespaces, and the definitions if its release made them.

    In a cluster that is there for tests alone (OWN_CLUSTER=true) also the definitions that other tests left.
    """
    for name in (NAMESPACE, OTHER_NAMESPACE):
        found = run("kubectl", "get", "namespace", "-l", "eventprojector.io/e2e=true", "-o", "name").split()
        if f"namespace/{name}" not in found:
            continue
        for release in run("helm", "list", "--namespace", name, "--all", "--short").split():
            run("helm", "uninstall", release, "--namespace", name, "--wait", "--timeout=120s")
        # Not before the operator is gone, which would put them on again.
        for kind in ("projections", "eventstores"):
            release_finalizers(Namespace(name), kind)
        run("kubectl", "delete", "namespace", name, "--timeout=120s")
    for crd in CRDS:
        try:
            made_by = run(
                "kubectl", "get", "crd", crd, "-o", r"jsonpath={.metadata.annotations.meta\.helm\.sh/release-namespace}"
            )
        except CommandError:
            continue
        if made_by == NAMESPACE or os.environ.get("OWN_CLUSTER") == "true":
            run("kubectl", "delete", "crd", crd, "--timeout=60s")


def release_finalizers(namespace: Namespace, kind: str) -> None:
    """Without an operator nobody else would."""
    try:
        names = namespace.kubectl("get", kind, "-o", "name").split()
    except CommandError:
        return
    for name in names:
        namespace.kubectl("patch", name, "--type=merge", "-p", '{"metadata":{"finalizers":null}}')


@pytest.fixture(autouse=True)
def state_of_the_cluster_on_failure(request: pytest.FixtureRequest, namespace: Namespace) -> Iterator[None]:
    """What a person would ask first."""
    failed_before = request.session.testsfailed
    yield
    if request.session.testsfailed > failed_before:
        for what in (
            ("get", "pods,jobs,projections,eventstores", "-o", "wide"),
            ("get", "events", "--sort-by=.lastTimestamp"),
        ):
            try:
                print(namespace.kubectl(*what)[-6_000:])
            except CommandError as error:
                print(error)
        for source in (
            "deployment/es-eventprojector-projector",
            "deployment/es-eventprojector-operator",
            "pod/es-eventprojector-test",
        ):
            try:
                print(namespace.kubectl("logs", source, "--all-containers", "--prefix", "--tail=40"))
            except CommandError as error:
                print(error)
