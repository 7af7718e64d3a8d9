"""The injector behind a real API server: pods that ask for the sidecar are stored with it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import ssl
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from projector.operator.settings import InjectorSettings
from tests.conftest import missing
from tests.integration.operator.cluster import ApiError, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.integration.operator.cluster import Api, Operators, Resources


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for the machine itself."""
    openssl = shutil.which("openssl")
    if openssl is None:
        missing("there is no openssl, which makes the webhook's certificate")
    crt, key = folder / f"{name}.crt", folder / f"{name}.key"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    command += ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(crt)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return crt, key


@pytest.fixture
async def webhook(
    operators: Operators, resources: Resources, tmp_path: Path, unused_tcp_port: int
) -> AsyncIterator[str]:
    """The operator with its injector, and the configuration that sends the namespace's pods there."""
    crt, key = certificate(tmp_path, "injector")
    settings = InjectorSettings(
        enabled=True, host="127.0.0.1", port=unused_tcp_port, cert_file=crt, key_file=key, image="eventprojector:1"
    )
    name = f"inject-{resources.namespace}"
    path = f"/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/{name}"
    hook = {
        "name": "appender.injector.eventprojector.io",
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "failurePolicy": "Ignore",
        "timeoutSeconds": 5,
        "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": resources.namespace}},
        "matchConditions": [
            {
                "name": "asks-for-the-sidecar",
                "expression": "has(object.metadata.annotations)"
                " && object.metadata.annotations[?'eventprojector.io/inject'].orValue('') == 'true'",
            }
        ],
        "clientConfig": {
            "url": f"https://127.0.0.1:{unused_tcp_port}/inject",
            "caBundle": base64.b64encode(crt.read_bytes()).decode(),
        },
    }
    api = resources.api
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
    await api.apply(f"/api/v1/namespaces/{resources.namespace}/serviceaccounts/default", account)
    configuration = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "MutatingWebhookConfiguration",
        "metadata": {"name": name},
        "webhooks": [hook],
    }
    await api.apply(path, configuration)
    async with operators.run(injector=settings):
        yield name
    await api.call("DELETE", path)


async def create(api: Api, namespace: str, name: str, **annotations: str) -> dict[str, Any]:
    body = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "annotations": {f"eventprojector.io/{key}": value for key, value in annotations.items()},
        },
        "spec": {"containers": [{"name": "shop", "image": "shop:1"}]},
    }
    return await api.call("POST", f"/api/v1/namespaces/{namespace}/pods", body)


@pytest.mark.usefixtures("webhook")
async def test_pods_are_stored_with_the_sidecar(resources: Resources) -> None:
    api, namespace = resources.api, resources.namespace
    made: dict[str, Any] = {}

    async def injected() -> bool:  # the API server takes up a new webhook within a second or so
        name = f"shop-{len(made)}"
        made[name] = await create(api, namespace, name, inject="true")
        return bool(made[name]["spec"].get("initContainers"))

    await until(injected)
    [container] = list(made.values())[-1]["spec"]["initContainers"]
    assert (container["name"], container["image"], container["restartPolicy"]) == (
        "appender",
        "eventprojector:1",
        "Always",
    )
    plain = await create(api, namespace, "plain")
    assert "initContainers" not in plain["spec"]
    with pytest.raises(ApiError, match=r"eventprojector\.io/port"):
        await create(api, namespace, "bad", inject="true", port="http")


async def test_a_renewed_certificate_is_taken_up(operators: Operators, tmp_path: Path, unused_tcp_port: int) -> None:
    crt, key = certificate(tmp_path, "first")
    settings = InjectorSettings(enabled=True, host="127.0.0.1", port=unused_tcp_port, cert_file=crt, key_file=key)
    async with operators.run(injector=settings):

        async def shown() -> bool:
            # Refused: before the webhook listens, and by the connection that finds the new certificate.
            with contextlib.suppress(OSError):
                return await served(unused_tcp_port) == crt.read_text()
            return False

        await until(shown)
        new_crt, new_key = certificate(tmp_path, "second")
        new_key.replace(key)
        new_crt.replace(crt)
        await until(shown)


async def served(port: int) -> str:
    """The certificate that the webhook shows."""
    return await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port), timeout=10)
