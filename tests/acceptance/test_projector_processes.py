"""`projector run`, `projector dev` and the demo as processes: how they start, what they say, how they end."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import psutil
import pytest
from click.testing import CliRunner

from projector.cli import main
from tests.eventually import eventually
from tests.projecting import Writer
from tests.projector_process import PROJECTOR, ProjectorProcess, environment

if TYPE_CHECKING:
    from eventstore.client import Database

ROOT = Path(__file__).parents[2]
SHOP = str(ROOT / "examples" / "shop" / "projections")


async def _command(env: dict[str, str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    done = await asyncio.to_thread(
        subprocess.run, [*PROJECTOR, *arguments], env=env, capture_output=True, text=True, check=False, timeout=90
    )
    return done.returncode, done.stdout, done.stderr


async def _invoke(env: dict[str, str], *arguments: str) -> tuple[int, str, str]:
    """As `_command`, without a process of its own: a command in a thread, as many of them need half a second each."""
    done = await asyncio.to_thread(CliRunner().invoke, main, arguments, env=env)
    return done.exit_code, done.stdout, done.stderr


async def test_commands_against_a_running_projector(mongodb_uri: str, database: Database, tmp_path: Path) -> None:
    """One process of `run` with declared and Python projections; each verb once, as a person would use it."""
    env = environment(mongodb_uri, database.name, PROJECTOR_LEASE_SECONDS="0.5")
    writer = Writer(database)
    with ProjectorProcess.run("run", "--projections", SHOP, "--module", "examples.shop.sales", env=env) as projector:
        await projector.ready()
        await writer.append(
            "o-1", "OrderPlaced", customerId="c-1", totalCents=5, currency="EUR",
            items=[{"productId": "p-1", "quantity": 1, "priceCents": 5}],
        )  # fmt: skip
        await writer.append("o-1", "SomethingElse")

        async def shown() -> bool:
            return (await _invoke(env, "wait", "orders", "o-1", "2"))[0] == 0

        await eventually(shown)

        async def all_live() -> bool:
            code, output, _ = await _invoke(env, "list", "-o", "json")
            return code == 0 and all(row["live"] for row in json.loads(output)["projections"])

        await eventually(all_live)
        code, output, _ = await _invoke(env, "list", "-o", "json")
        rows = {row["name"]: row for row in json.loads(output)["projections"]}
        assert list(rows) == ["customers", "orders", "products", "sales"]
        assert rows["orders"]["live"] == "orders.v1"
        code, output, _ = await _command(env, "list")
        assert (code, len(output.splitlines())) == (0, 5)
        code, output, _ = await _invoke(env, "show", "orders")
        assert code == 0
        assert "orders.v1/0" in output
        code, output, errors = await _invoke(env, "show", "permits")
        assert (code, output) == (1, "")
        assert "there is customers, orders, products, sales" in errors

        code, output, _ = await _invoke(env, "wait", "orders", "o-1", "3", "--timeout", "0.1")
        assert code == 1
        assert "the log has no event 3" in output
        assert (await _invoke(env, "verify", "orders"))[0] == 0
        code, _, errors = await _invoke(env, "verify", "sales")
        assert code == 1
        assert "--module" in errors
        assert (await _invoke(env, "verify", "sales", "--module", "examples.shop.sales"))[0] == 0

        assert (await _invoke(env, "pause", "orders"))[0] == 0
        assert "paused" in (await _invoke(env, "list"))[1]
        assert (await _invoke(env, "resume", "orders"))[0] == 0
        assert (await _invoke(env, "partitions", "orders", "2"))[0] == 0
        code, output, errors = await _invoke(env, "rebuild", "orders", "--wait")
        assert (code, output.strip()) == (0, "orders.v1-2 is live."), errors
        code, output, _ = await _invoke(env, "rollback", "orders", "-o", "json")
        assert (code, json.loads(output)) == (0, {"build": "orders.v1"})

        async def rolled_back() -> bool:
            return json.loads((await _invoke(env, "show", "orders", "-o", "json"))[1])["live"] == "orders.v1"

        await eventually(rolled_back)
        code, output, _ = await _invoke(env, "parked", "list", "orders")
        assert (code, output.strip()) == (0, "Nothing is set aside.")
        assert (await _invoke(env, "parked", "skip", "orders", "o-1", "1"))[0] == 1
        assert (await _invoke(env, "parked", "retry", "orders"))[0] == 0
        code, _, errors = await _invoke(env, "drop", "orders", "--yes")
        assert code == 1
        assert "is being run" in errors

        # Damage is found, by exit code and in words.
        await database["orders.v1"].update_one({"_id": "o-1"}, {"$set": {"status": "stolen"}})
        code, output, _ = await _invoke(env, "verify", "orders", "-o", "json")
        assert code == 1
        assert json.loads(output)["findings"][0]["detail"].startswith("status: it is 'stolen'")

        assert projector.end() == 0
        events = [json.loads(line)["event"] for line in projector.output]
        assert events[-1] == "projector_stopped"
    assert await database["projector.leases"].count_documents({}) == 0
    code, output, _ = await _invoke(env, "drop", "sales", "--yes")
    assert code == 0
    assert not [name for name in await database.list_collection_names() if name.startswith("sales")]


async def test_run_lives_without_mongodb_and_says_so() -> None:
    uri = "mongodb://someone:secret-word@127.0.0.1:1/?serverSelectionTimeoutMS=200"
    env = environment(uri, "eventstore")
    with ProjectorProcess.run("run", "--projections", SHOP, env=env) as projector:

        async def says_why() -> bool:
            status, answer = await projector.get("/readyz")
            return bool(status == 503 and "127.0.0.1:1" in answer["reason"])

        async def listens() -> bool:
            return (await projector.get("/healthz"))[0] == 200

        await eventually(listens)
        # Each of them waits some seconds for a server.
        _, (status, problem), (code, _, errors) = await asyncio.gather(
            eventually(says_why), projector.get("/v1/projections"), _command(env, "list")
        )
        assert (status, problem["type"]) == (503, "urn:eventprojector:problem:unavailable")
        assert projector.end() == 0
    assert code == 1
    assert "MongoDB" in errors
    for text in (*projector.output, errors):
        assert "secret-word" not in text


async def test_run_that_cannot_listen_ends_with_a_reason(mongodb_uri: str, database_name: str, tmp_path: Path) -> None:
    env = environment(mongodb_uri, database_name)
    with ProjectorProcess.run("run", "--projections", SHOP, env=env) as first:

        async def listens() -> bool:
            return (await first.get("/healthz"))[0] == 200

        await eventually(listens)
        taken = env | {"PROJECTOR_HTTP_HOST": "127.0.0.1", "PROJECTOR_HTTP_PORT": str(first.port)}
        code, output, _ = await _command(taken, "run", "--projections", SHOP)
        assert code == 1
        assert "projector_failed" in output
        empty = tmp_path / "token"
        empty.touch()
        code, output, _ = await _command(env | {"PROJECTOR_TOKEN_FILE": str(empty)}, "run", "--projections", SHOP)
        assert code == 1
        assert "has no token" in output


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
async def test_dev_runs_everything_and_leaves_nothing(how: signal.Signals) -> None:
    env = {"EVENTSTORE_DATABASE": "tried", "LOG_LEVEL": "warning"}
    arguments = ("dev", "--projections", SHOP, "--port", "0", "--ops-port", "0")
    with ProjectorProcess.run(*arguments, env=environment("mongodb://nowhere", "tried") | env) as dev:

        async def invites() -> bool:
            assert dev.process.poll() is None, "".join(dev.output)
            return any("Ctrl-C" in line for line in dev.output)

        await eventually(invites, timeout=60)
        children = psutil.Process(dev.process.pid).children(recursive=True)
        assert any("mongod" in child.name() for child in children)
        text = "".join(dev.output)
        appender, projector = re.findall(r"^  (?:Appender|Projector) +(http://\S+)$", text, re.MULTILINE)
        event = {"eventName": "OrderPlaced", "payload": {"customerId": "c-1"}}
        async with aiohttp.ClientSession(raise_for_status=True) as session:
            async with session.post(f"{appender}/v1/aggregates/o-1/events", json={"events": [event]}) as answer:
                assert (await answer.json())["lastSequenceNo"] == 1
            query = {"aggregateId": "o-1", "sequenceNo": "1", "timeout": "30"}
            async with session.get(f"{projector}/v1/projections/orders/wait", params=query) as answer:
                assert (await answer.json())["reached"] is True
        assert dev.end(how) == 0, "".join(dev.output)
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


async def test_dev_says_what_is_in_the_way(tmp_path: Path) -> None:
    env = environment("mongodb://nowhere", "tried")
    code, _, errors = await _command(env, "dev")
    assert code == 2
    assert "--projections" in errors
    (tmp_path / "bad.yaml").write_text("name: x\non: {a: {$inc: {n: one}}}\n")
    code, _, errors = await _command(env, "dev", "--projections", str(tmp_path))
    assert code == 1
    assert "bad.yaml" in errors


async def test_the_demo_shows_the_whole_path() -> None:
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-m", "examples.demo"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("orders: 58 documents", "appended over HTTP", "projected to customers", "took"):
        assert text in done.stdout
    assert done.stdout.count("compared with a fresh fold of the log, no difference") == 4


async def test_a_demo_that_fails_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log.ndjson"
    log.write_text('{"aggregateId": "a", "eventName": "x", "payload": {}, "surprise": 1}\n')
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "examples.demo", str(log)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "line 1: unknown field surprise" in done.stderr
