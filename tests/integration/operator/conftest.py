"""A real kube-apiserver beside the real MongoDB, and operators that run in the test's own loop.

The control plane is the one of the machine: if it does not run yet, `../shared/cluster/up --control-plane` starts it, and it is
ended with the session. Other sessions may use it too, so that each test has a namespace of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import subprocess
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import kopf
import pytest

from eventstore.client import connect
from projector.operator.crds import KINDS, manifest
from projector.operator.kubernetes import login
from projector.operator.resources import GROUP, VERSION
from tests.conftest import missing
from tests.integration.operator.cluster import HOME, PLURALS, Api, ApiError, Operators, Resources, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from eventstore.client import Client, Database

PROGRAMS = Path(__file__).parents[4] / "shared" / "cluster"


def _answers(kubeconfig: Path) -> bool:
    command = [str(HOME / "bin" / "kubectl"), "--kubeconfig", str(kubeconfig), "get", "--raw", "/readyz"]
    return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0


@pytest.fixture(scope="session")
def kubeconfig() -> Iterator[Path]:
    """A kubeconfig of a running API server."""
    if not (HOME / "bin" / "kube-apiserver").is_file() or not (PROGRAMS / "up").is_file():
        missing("no programs of the cluster: ../shared/cluster/build makes them")
    path = HOME / "kubeconfig"
    with (Path(tempfile.gettempdir()) / "cluster.lock").open("w") as lock:
        _take(lock, fcntl.LOCK_SH)  # whoever installs another set of CRDs, or ends the cluster, takes it alone
        started = not path.is_file() or not _answers(path)
        if started:
            # Its output to a file: what it starts keeps the descriptors, and a pipe would never end.
            with tempfile.TemporaryFile() as output:
                command = [PROGRAMS / "up", "--control-plane"]
                if subprocess.run(command, stdout=output, stderr=output, timeout=90, check=False).returncode:
                    output.seek(0)
                    pytest.fail(output.read().decode(errors="replace"))
        yield path
        if started:
            with contextlib.suppress(OSError):  # another session uses it still: the last one ends it, or nobody
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                subprocess.run([PROGRAMS / "down"], capture_output=True, timeout=60, check=False)


def _take(lock: Any, how: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() > deadline:
                missing("another run has the cluster for itself")
            time.sleep(0.2)


@pytest.fixture
async def api(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    """The API server, with our CRDs as they are in the code."""
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    info = login(kopf.OperatorSettings())
    assert info is not None
    connector = aiohttp.TCPConnector(ssl=info.as_ssl_context())
    async with aiohttp.ClientSession(connector=connector, headers=info.as_http_headers()) as session:
        api = Api(session, str(info.server))
        for kind in KINDS:
            name = f"{kind.plural}.{GROUP}"
            await api.apply(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}", manifest(kind))
        for kind in KINDS:
            await until(lambda plural=kind.plural: _served(api, plural))
        yield api


async def _served(api: Api, plural: str) -> bool:
    try:
        await api.call("GET", f"/apis/{GROUP}/{VERSION}/{plural}?limit=1")
    except ApiError:
        return False
    return True


@pytest.fixture
async def resources(api: Api) -> AsyncIterator[Resources]:
    """A namespace of the test's own; what is left in it at the end loses its finalizers and goes."""
    namespace = f"test-{uuid.uuid4().hex[:10]}"
    await api.call("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    found = Resources(api, namespace)
    yield found
    for kind in PLURALS:
        for item in (await api.call("GET", found.path(kind)))["items"]:
            with contextlib.suppress(ApiError):
                await found.patch(kind, item["metadata"]["name"], {"metadata": {"finalizers": None}})
        await api.call("DELETE", found.path(kind))
    await api.call("DELETE", f"/api/v1/namespaces/{namespace}")


@pytest.fixture
def operators(mongodb_uri: str, resources: Resources, database_name: str) -> Operators:
    """A maker of operators."""
    return Operators(mongodb_uri, resources.namespace, database_name)


@pytest.fixture
async def empty(client: Client, database_name: str) -> AsyncIterator[Database]:
    """The database that the operator works on; nothing is in it yet."""
    await client.admin.command(
        "ping"
    )  # kopf ends by waiting for all tasks that began after it: the client's began before
    yield client[database_name]
    await client.drop_database(database_name)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that give up after half a second instead of five, so that the tests of an absent MongoDB are short."""
    monkeypatch.setattr(
        "projector.operator.mongo.connect",
        lambda uri, component, **options: connect(uri, component, **{"serverSelectionTimeoutMS": 500} | options),
    )
