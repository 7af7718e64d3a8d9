"""Every panel and every alert of the shipped files against a real Prometheus, through load and faults.

A panel that shows no data, or an alert that cannot fire, would be found by nobody before the night in which it is needed.
So the processes run for some minutes; each fault is made, and lasts until Prometheus has seen it. At the end every
expression is asked over the whole run, and each must have found something. `PICTURES=FOLDER` draws the dashboards besides.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import aiohttp
import pytest
import yaml
from pydantic import SecretStr
from pymongo.write_concern import WriteConcern

from deploy.observability.expressions import Expression, of_dashboards, of_rules
from deploy.observability.pictures import draw
from eventstore.client import Client, connect
from eventstore.embedded import ReplicaSet, free_port
from tests.acceptance.observed import Process, Prometheus, eventually, prometheus
from tests.conftest import missing, need_mongod
from tests.integration.operator.cluster import Api, Resources
from tests.integration.operator.conftest import api, kubeconfig, resources

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

__all__ = ["api", "kubeconfig", "resources"]  # fixtures

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

LATER_SECONDS = 700
LATER = {"IndexReconcileStalled"}
"""Alerts on something that has not happened for ten minutes: asked as of so much later, as if the run had gone on."""

PROJECTIONS: dict[str, dict[str, Any]] = {
    "orders": {"on": {"*": {"$inc": {"events": 1}, "$max": {"lastAt": "$timestamp"}}}},
    "customers": {
        "readModel": {"key": "$payload.customer"},
        "on": {"Placed": {"$inc": {"orders": 1, "spent": "$payload.total"}}},
    },
    # Text cannot be added: these events fail for good.
    "parking": {"on": {"Poisoned": {"$inc": {"sum": "$payload.text"}}, "*": {"$inc": {"events": 1}}}},
    "fragile": {"on": {"Broken": {"$inc": {"sum": "$payload.text"}}, "*": {"$inc": {"events": 1}}}},
}
MAX_PARKED = 3


@dataclass
class World:
    """Everything that runs."""

    mongod: ReplicaSet
    client: Client
    folder: Path
    kubeconfig: Path
    resources: Resources
    lonely: str
    """A Kubernetes namespace whose operator has no MongoDB."""
    processes: dict[str, Process] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shop = {"MONGODB_URI": self.mongod.uri, "EVENTSTORE_DATABASE": "shop"}
        for number in (1, 2):
            appender = self._add(
                f"appender-{number}", "shop", ["appender", "serve"], shop | {"APPENDER_DEADLINE_SECONDS": "8"}
            )
            appender.environment |= {"APPENDER_PORT": str(appender.port)}
        folder = self.folder / "projections"
        folder.mkdir()
        for name, definition in PROJECTIONS.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "version": 1, **definition}))
        quick = {
            "PROJECTOR_HTTP_HOST": "127.0.0.1",
            "PROJECTOR_RETRY_SECONDS": "1",
            "PROJECTOR_LEASE_SECONDS": "5",
            "PROJECTOR_MAX_PARKED": str(MAX_PARKED),
        }
        run = ["projector", "run", "--projections", str(folder)]
        for name, namespace, database in (
            ("projector-1", "shop", "shop"),
            ("projector-2", "shop", "shop"),
            ("projector-3", "stuck", "stuck"),
        ):
            projector = self._add(name, namespace, run, shop | quick | {"EVENTSTORE_DATABASE": database})
            projector.environment |= {"PROJECTOR_HTTP_PORT": str(projector.port)}
        crt, key = _certificate(self.folder)
        operating = {
            "KUBECONFIG": str(self.kubeconfig),
            "OPERATOR_HTTP_HOST": "127.0.0.1",
            "OPERATOR_RESYNC_SECONDS": "0.5",
            "OPERATOR_POLL_SECONDS": "0.2",
            "INJECTOR_CERT_FILE": str(crt),
            "INJECTOR_KEY_FILE": str(key),
            "INJECTOR_HOST": "127.0.0.1",
        }
        self.webhook = free_port()
        for name, namespace, more in (
            ("operator-1", "shop", {"OPERATOR_NAMESPACES": self.resources.namespace, "INJECTOR_ENABLED": "true"}),
            ("operator-2", "lonely", {"OPERATOR_NAMESPACES": self.lonely, "MONGODB_URI": "mongodb://127.0.0.1:1"}),
        ):
            operator = self._add(name, namespace, ["projector", "operator"], shop | operating | more)
            operator.environment |= {"OPERATOR_HTTP_PORT": str(operator.port), "INJECTOR_PORT": str(self.webhook)}

    def _add(self, name: str, namespace: str, command: list[str], environment: dict[str, str]) -> Process:
        process = Process(name, namespace, command, environment, self.folder)
        self.processes[name] = process
        return process

    def start(self, *names: str) -> None:
        """Starts processes by name."""
        for name in names:
            self.processes[name].start()

    def end(self) -> None:
        """Ends all that run, those that take long at the same time."""
        running = [process for process in self.processes.values() if process.running is not None]
        for process in running:
            assert process.running is not None
            process.running.terminate()
        for process in running:
            process.end()

    async def projector(self, *verb: str) -> None:
        """Carries out a verb of the command `projector`."""
        process = Process("verb", "", ["projector", *verb], self.processes["projector-1"].environment, self.folder)
        process.start()
        assert process.running is not None
        assert await asyncio.to_thread(process.running.wait, 60) == 0, process.log

    async def fail(self, point: str, mode: str = "alwaysOn", **data: Any) -> None:
        """Turns a fault of mongod on or off."""
        command: dict[str, Any] = {"configureFailPoint": point, "mode": mode}
        await self.client.admin.command(command | ({"data": data} if data else {}))


def _certificate(folder: Path) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        missing("there is no openssl, which makes the webhook's certificate")
    crt, key = folder / "tls.crt", folder / "tls.key"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-out", str(crt), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    return crt, key


class Load:
    """Appends orders by two appenders, as callers do that repeat themselves and run into each other now and then."""

    def __init__(self, world: World, session: aiohttp.ClientSession) -> None:
        self._urls = [f"http://{world.processes[name].instance}" for name in ("appender-1", "appender-2")]
        self._session = session
        self._numbers = itertools.count(1)
        self._random = random.Random(1)
        self.codes: dict[int, int] = {}

    async def post(self, aggregate_id: str, *events: dict[str, Any], **more: Any) -> int:
        """Appends to one aggregate; the answer's code, 0 without one."""
        url = f"{self._random.choice(self._urls)}/v1/aggregates/{quote(aggregate_id, safe='')}/events"
        code = 0
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with self._session.post(url, json={"events": list(events), **more}) as response:
                await response.read()
                code = response.status
        self.codes[code] = self.codes.get(code, 0) + 1
        return code

    async def run(self) -> None:
        """One caller, until it is cancelled."""
        chance = self._random.random
        while True:
            number = next(self._numbers)
            event = {
                "eventId": f"e-{number}",
                "eventName": self._random.choice(("Placed", "Paid", "Shipped")),
                "payload": {"customer": f"c-{number % 20}", "total": number % 100},
            }
            aggregate_id = "hot" if chance() < 0.3 else f"order-{number % 200}"
            more = {"expectedSequenceNo": 10**6} if chance() < 0.3 else {}
            await self.post(aggregate_id, event, **more)
            if chance() < 0.2:
                await self.post(aggregate_id, event)  # a repeat, which may be a first time after a conflict
            if chance() < 0.1:
                lines = "\n".join(
                    f'{{"aggregateId":"bulk-{i}","eventName":"Counted","payload":{{}}}}' for i in range(10)
                )
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    headers = {"Content-Type": "application/x-ndjson"}
                    async with self._session.post(
                        f"{self._urls[0]}/v1/events", data=lines, headers=headers
                    ) as response:
                        await response.read()
                    async with self._session.get(f"{self._urls[1]}/v1/aggregates/hot/events?after=0") as response:
                        await response.read()
            await asyncio.sleep(0.02)

    @contextlib.asynccontextmanager
    async def running(self, callers: int = 4) -> AsyncIterator[None]:
        """Callers at work."""
        tasks = [asyncio.create_task(self.run()) for _ in range(callers)]
        try:
            yield
            assert not any(task.done() for task in tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def mongod() -> Iterator[ReplicaSet]:
    """A mongod of the run's own, which can be told to fail, and with an oplog that is soon full."""
    need_mongod()
    with ReplicaSet(
        oplog_mib=16, parameters={"enableTestCommands": "1"}, arguments=["--syncdelay", "1"]
    ) as replica_set:
        yield replica_set


@pytest.fixture
async def lonely(api: Api) -> AsyncIterator[Resources]:
    """A second Kubernetes namespace."""
    namespace = f"lonely-{time.time_ns()}"
    await api.call("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    found = Resources(api, namespace)
    yield found
    for item in (await api.call("GET", found.path("EventStore")))["items"]:
        await found.patch("EventStore", item["metadata"]["name"], {"metadata": {"finalizers": None}})
    await api.call("DELETE", found.path("EventStore"))
    await api.call("DELETE", f"/api/v1/namespaces/{namespace}")


@pytest.fixture
async def world(
    mongod: ReplicaSet,
    tmp_path: Path,
    kubeconfig: Path,
    resources: Resources,
    lonely: Resources,
) -> AsyncIterator[World]:
    """The processes, not yet started."""
    async with connect(SecretStr(mongod.uri), "test") as client:
        made = World(mongod, client, tmp_path, kubeconfig, resources, lonely.namespace)
        try:
            yield made
        finally:
            made.end()


async def test_every_panel_and_every_alert_finds_something(world: World, lonely: Resources) -> None:
    expressions = [*of_rules(), *of_dashboards()]
    pictures = os.environ.get("PICTURES")
    async with (
        prometheus(world.folder, list(world.processes.values()), LATER_SECONDS + 100) as server,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=15)) as session,
    ):
        load = Load(world, session)
        world.start("appender-1", "appender-2")
        await nobody_is_there(server)
        world.start("projector-1", "projector-3", "operator-1", "operator-2")
        await lonely.create("EventStore", "unreachable", {"database": "unreachable"})
        await server.seen('projector_health{namespace="stuck", projection="orders", state="live"} == 1')
        # Of the projector of the database `stuck` alone; it takes two minutes to show all of it.
        await world.fail("failCommand", failCommands=["getMore", "aggregate"], namespace="stuck.events", errorCode=50)
        await server.seen('projector_health{namespace="stuck", projection="orders", state="waiting"} == 1')
        async with load.running():
            await server.seen("sum(rate(projector_events_processed_total[15s])) > 10")
            await callers_err(server, load)
            await events_fail(server, load)
            await resources_are_wrong(server, world, session)
            await a_replica_dies(server, world)
            await a_position_is_lost(server, world)
            await a_read_model_is_built_anew(server, world)
            await mongodb_is_silent(server, world, load)
            for alert in ("ProjectorStuck", "ProjectorLagHigh", "ProjectorLagGrowing", "ProjectorHeartbeatMissing"):
                for expression in expressions:
                    if f": {alert} " in expression.where:
                        await server.seen(expression.filled(), alert, 180)
            for expression in expressions:
                if "ProjectorOplogHeadroomLow" in expression.where:
                    await server.seen(expression.filled(), expression.where, 240)
            if pictures:  # the way back to normal belongs to the picture
                await asyncio.sleep(60)
        assert load.codes.keys() >= {200, 201, 409, 503}
        end = time.time() + 2  # what was seen a moment ago may lie after the last whole second
        empty = [expression.where for expression in expressions if not await finds(server, expression, end)]
        assert empty == []
        if pictures:
            await draw(server.course, server.started, end, Path(pictures))


async def finds(server: Prometheus, expression: Expression, end: float) -> bool:
    """Whether an expression found anything in the run, or would have soon after it."""
    text = expression.filled("15s")
    if any(alert in expression.where for alert in LATER):
        return bool(await server.now(text, end + LATER_SECONDS))
    return bool(await server.course(text, server.started, end))


# Faults, each until Prometheus has seen it


async def nobody_is_there(server: Prometheus) -> None:
    """Neither projector nor operator run."""
    await server.seen("appender_build_info")
    await server.seen("absent(projector_build_info)")
    await server.seen("absent(indexer_build_info)")


async def callers_err(server: Prometheus, load: Load) -> None:
    """An eventId is used for two events."""
    event = {"eventId": "twice", "eventName": "Placed", "payload": {}}
    assert await load.post("order-a", event) == 201
    await server.seen("sum(appender_event_id_conflicts_total) == 0")
    assert await load.post("order-b", event) == 409
    await server.seen('ALERTS{alertname="AppenderEventIdConflicts", alertstate="firing"}')


async def events_fail(server: Prometheus, load: Load) -> None:
    """Some events fail for good, of one projection more than it may set aside; and one is missing."""
    await load.post("poisoned", {"eventName": "Poisoned", "payload": {"text": "no number"}})
    await load.post("poisoned", {"eventName": "Placed", "payload": {}})
    await server.seen('projector_parked_aggregates{projection="parking", state="parked"} > 0')
    for number in range(MAX_PARKED + 1):
        await load.post(f"broken-{number}", {"eventName": "Broken", "payload": {"text": "no number"}})
    await server.seen('projector_health{projection="fragile", state="failed"} == 1')


async def a_replica_dies(server: Prometheus, world: World) -> None:
    """The owner of everything is killed; until its leases have expired nobody runs anything."""
    owner, other = world.processes["projector-1"], world.processes["projector-2"]
    await world.projector("partitions", "customers", "2")
    await server.seen(f'sum(projector_partitions_owned{{instance="{owner.instance}"}}) > 3')
    other.start()
    await server.seen('max(projector_replicas{namespace="shop"}) == 2')
    owner.end(signal.SIGKILL)
    expression = next(each for each in of_rules() if "ProjectorPartitionsUnowned" in each.where)
    await server.seen(expression.filled())
    owner.start()
    # Only who takes a partition over ends the transaction that the killed owner left open.
    for name in ("orders", "customers", "parking"):
        await server.seen(f'sum(projector_partitions_owned{{namespace="shop", projection="{name}"}}) > 0')


async def a_position_is_lost(server: Prometheus, world: World) -> None:
    """While no projector runs the oplog rolls past where they stood, and somebody removes an event."""
    projectors = [world.processes[name] for name in ("projector-1", "projector-2")]
    await asyncio.gather(*(asyncio.to_thread(process.end) for process in projectors))
    events = world.client["shop"]["events"]
    found = await events.find_one({"aggregateId": "hot"}, sort=[("sequenceNo", -1)])
    assert found is not None

    async def went_on() -> bool:
        return await events.count_documents({"aggregateId": "hot", "sequenceNo": {"$gt": found["sequenceNo"]}}) > 0

    await eventually(went_on, "the removed event has one after it")
    await events.delete_one({"_id": found["_id"]})
    await roll(world.client)
    for process in projectors:
        process.start()
    for name in ("orders", "customers", "parking"):
        restarts = f'projector_stream_restarts_total{{projection="{name}", reason="history_lost"}}'
        await server.seen(f'sum({restarts}) > 0 and sum(projector_health{{projection="{name}", state="live"}}) > 0')
    await server.seen("sum(projector_repaired_events_total) > 0")
    await server.seen("sum(projector_gaps_total) > 0")


async def roll(client: Client) -> None:
    """Fills the oplog until nothing of this moment is left in it."""
    filler = client.get_database("filler", write_concern=WriteConcern(w=1))["filler"]
    now = time.time()

    async def gone() -> bool:
        await filler.insert_many([{"x": "x" * 2**18} for _ in range(4)])
        first = await client["local"]["oplog.rs"].find_one({}, {"ts": 1}, sort=[("$natural", 1)])
        return first is not None and first["ts"].time > now

    await eventually(gone, "the oplog has rolled")
    await client.drop_database("filler")


async def a_read_model_is_built_anew(server: Prometheus, world: World) -> None:
    """A rebuild beside the load."""
    await world.projector("rebuild", "orders")
    await server.seen("sum(projector_rebuild_events_total) > 0")


async def resources_are_wrong(server: Prometheus, world: World, session: aiohttp.ClientSession) -> None:
    """Indexes are dropped and replaced by hand, one is being built, and the injector is asked nonsense."""
    indexes = [{"name": "by_name", "keys": [{"field": "eventName"}]}]
    await world.resources.create("EventStore", "log", {"database": "drifting", "indexes": indexes})
    await world.resources.until_ready("EventStore", "log")
    events = world.client["drifting"]["events"]

    async def is_there() -> bool:
        return "by_name" in await events.index_information()

    for _ in range(5):
        await events.drop_index("by_name")
        await eventually(is_there, "a dropped index comes back")
    await server.seen('sum(increase(indexer_drift_total{action="created"}[1h])) > 3')
    await world.client["building"]["events"].insert_many({"aggregateId": str(i), "sequenceNo": 1} for i in range(1_000))
    hang = "hangAfterStartingIndexBuildUnlocked"
    await world.fail(hang)
    await world.resources.create("EventStore", "building", {"database": "building", "indexes": indexes})
    await server.seen("indexer_index_build_progress_ratio")
    await world.fail(hang, "off")
    await events.drop_index("by_name")
    with contextlib.suppress(Exception):  # the operator may be faster; then its own is replaced in the next round
        await events.create_index({"timestamp": 1}, name="by_name")
    url = f"https://127.0.0.1:{world.webhook}/inject"
    async with session.post(url, json={"kind": "nonsense"}, ssl=False) as response:
        assert response.status == 400, await response.text()
    for alert in ("IndexNotReady", "IndexDrift", "IndexReconcileFailing", "InjectorFailing"):
        expression = next(each for each in of_rules() if f": {alert} " in each.where)
        await server.seen(expression.filled(), alert, 120)


async def mongodb_is_silent(server: Prometheus, world: World, load: Load) -> None:
    """MongoDB holds its connections and answers nothing, for longer than an append waits."""
    (member,) = world.mongod.members
    burns = [expression for expression in of_rules() if "AppenderErrorBudgetBurn" in expression.where]
    async with load.running(100):
        member.pause()
        try:
            await server.seen("max(appender_queue_oldest_age_seconds) > 5")
            for burn in burns:
                await server.seen(burn.filled())
        finally:
            member.resume()
    await server.seen('sum(rate(appender_http_requests_total{code="201"}[5s])) > 1')
