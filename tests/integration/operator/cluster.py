"""What the operator's tests share: a small client of the Kubernetes API, waiting, and operators in the test's own loop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import SecretStr

from eventstore.settings import EventStoreSettings
from projector.operator.app import Operator
from projector.operator.crds import KINDS
from projector.operator.resources import API_VERSION, GROUP, VERSION
from projector.operator.settings import InjectorSettings, OperatorSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import aiohttp

    from eventstore.client import Database

HOME = Path(os.environ.get("CLUSTER_HOME", Path.home() / ".cache" / "cluster"))
"""Where the cluster's programs and its kubeconfig lie."""

PLURALS = {kind.name: kind.plural for kind in KINDS}


ON = {"Opened": {"$set": {"status": "open"}}}
PROJECTION: dict[str, Any] = {"version": 1, "on": ON, "readModel": {"indexes": [{"keys": [{"field": "status"}]}]}}
BY_NAME = {"name": "by-name", "keys": [{"field": "eventName"}, {"field": "timestamp", "order": -1}]}


class ApiError(Exception):
    """The API server refused."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


@dataclass
class Api:
    """A minimal client of the Kubernetes API: paths and JSON."""

    session: aiohttp.ClientSession
    server: str

    async def call(self, method: str, path: str, body: Any = None, *, kind: str = "application/json") -> Any:
        async with self.session.request(
            method, f"{self.server}{path}", json=body, headers={"Content-Type": kind} if body is not None else None
        ) as response:
            if response.content_type != "application/json":
                return await response.text()
            answer = await response.json()
            if response.status >= 400:
                raise ApiError(response.status, answer.get("message", ""))
            return answer

    async def apply(self, path: str, body: Any) -> Any:
        """Server-side apply."""
        query = "?fieldManager=tests&force=true"
        return await self.call("PATCH", path + query, body, kind="application/apply-patch+yaml")


@dataclass
class Resources:
    """The custom resources of one namespace."""

    api: Api
    namespace: str

    def path(self, kind: str, name: str = "") -> str:
        base = f"/apis/{GROUP}/{VERSION}/namespaces/{self.namespace}/{PLURALS[kind]}"
        return f"{base}/{name}" if name else base

    async def create(self, kind: str, name: str, spec: dict[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
        body = {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}
        query = "?dryRun=All&fieldValidation=Strict" if dry_run else "?fieldValidation=Strict"
        return await self.api.call("POST", self.path(kind) + query, body)

    async def patch(self, kind: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
        return await self.api.call("PATCH", self.path(kind, name), body, kind="application/merge-patch+json")

    async def get(self, kind: str, name: str) -> dict[str, Any]:
        return await self.api.call("GET", self.path(kind, name))

    async def delete(self, kind: str, name: str) -> None:
        await self.api.call("DELETE", self.path(kind, name))

    async def events(self) -> list[dict[str, Any]]:
        return (await self.api.call("GET", f"/api/v1/namespaces/{self.namespace}/events"))["items"]

    async def until(
        self, kind: str, name: str, wanted: Callable[[dict[str, Any]], object], seconds: float = 30
    ) -> dict[str, Any]:
        """The resource once it is as wanted; a failure that shows its status otherwise."""
        deadline = time.monotonic() + seconds
        while True:
            found = await self.get(kind, name)
            if wanted(found):
                return found
            if time.monotonic() > deadline:
                pytest.fail(f"{kind} {name} has not become as wanted: {found.get('status')}")
            await asyncio.sleep(0.05)

    async def until_ready(
        self, kind: str, name: str, status: str = "True", reason: str | None = None, seconds: float = 30
    ) -> dict[str, Any]:
        """The resource once its Ready condition is this one, for its newest spec."""

        def wanted(found: dict[str, Any]) -> bool:
            ready = condition(found, "Ready")
            return bool(
                ready
                and ready["status"] == status
                and (reason is None or ready["reason"] == reason)
                and ready["observedGeneration"] == found["metadata"]["generation"]
            )

        return await self.until(kind, name, wanted, seconds)

    async def until_gone(self, kind: str, name: str, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                await self.get(kind, name)
            except ApiError as error:
                if error.status == 404:
                    return
                raise
            await asyncio.sleep(0.05)
        pytest.fail(f"{kind} {name} is still there: {await self.get(kind, name)}")


def condition(resource: dict[str, Any], kind: str) -> dict[str, Any]:
    """A condition of a resource; empty when it has none of that type."""
    conditions = resource.get("status", {}).get("conditions", [])
    return next((one for one in conditions if one["type"] == kind), {})


def index_state(resource: dict[str, Any], name: str) -> str | None:
    """The state of an index in a resource's status."""
    found = [one for one in resource.get("status", {}).get("indexes", []) if one["name"] == name]
    return found[0]["state"] if found else None


async def until(wanted: Callable[[], Any], seconds: float = 30) -> None:
    """Waits until an async question is answered with something true."""
    deadline = time.monotonic() + seconds
    while not await wanted():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s: {wanted}")
        await asyncio.sleep(0.05)


@dataclass
class Operators:
    """Starts operators for the test's namespace and database."""

    uri: str
    namespace: str
    database: str

    @contextlib.asynccontextmanager
    async def run(
        self, *, uri: str | None = None, injector: InjectorSettings | None = None, **settings: Any
    ) -> AsyncIterator[Operator]:
        """An operator, as `projector operator` runs it but quicker; ended at the end of the block."""
        defaults: dict[str, Any] = {
            "poll_seconds": 0.2,
            "resync_seconds": 0.5,
            "http_host": "127.0.0.1",
            "http_port": 0,
        }
        store = EventStoreSettings(mongodb_uri=SecretStr(uri or self.uri), eventstore_database=self.database)
        operator = Operator(
            OperatorSettings(namespaces=(self.namespace,), **(defaults | settings)), store, self.database, injector
        )
        loops: list[asyncio.AbstractEventLoop] = []
        stopping = asyncio.Event()

        async def main() -> None:
            loops.append(asyncio.get_running_loop())
            await operator.run(stopping)
            await asyncio.sleep(0.25)  # as aiohttp's documentation has it: TLS connections need a moment to close

        # In a loop of its own: kopf ends by cancelling whatever runs in its loop and began after it.
        task = asyncio.create_task(asyncio.to_thread(asyncio.run, main()))
        try:
            deadline = time.monotonic() + 20
            while operator.port is None and not task.done():
                assert time.monotonic() < deadline, "the operator has not started"
                await asyncio.sleep(0.01)
            yield operator
        finally:
            if loops and not task.done():
                loops[0].call_soon_threadsafe(stopping.set)
            await task


def store(database: Database, **spec: Any) -> dict[str, Any]:
    return {"database": database.name, "indexes": [BY_NAME]} | spec


async def passes(operator: Operator, kind: str) -> float:
    """How many passes over a kind there have been."""
    samples = next(iter(operator.metrics.reconciles.collect())).samples
    return sum(one.value for one in samples if one.labels["kind"] == kind and one.name.endswith("_total"))


async def some_passes(operator: Operator, kind: str, count: int = 3) -> None:
    before = await passes(operator, kind)

    async def enough() -> bool:
        return await passes(operator, kind) >= before + count

    await until(enough)
