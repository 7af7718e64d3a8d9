"""A real event log, end to end: appended over HTTP by 16 clients, projected by a process that is killed on the way.

The expectation is a fold of the CSV by the csv module alone.
"""

from __future__ import annotations

import asyncio
import csv
import datetime
import random
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appender.importer import import_file
from eventstore.client import open_database
from tests.appending import local_appender
from tests.conftest import missing
from tests.eventually import eventually
from tests.projecting import seeded
from tests.projector_process import PROJECTOR, ProjectorProcess, environment

if TYPE_CHECKING:
    from eventstore.client import Client, Database

ROOT = Path(__file__).parents[2]
RECEIPT = ROOT.parent / "shared" / "data" / "receipt.csv"
KILLS = 5

STATUS = {
    "Confirmation of receipt": "confirmed",
    "T05 Print and send confirmation of receipt": "confirmation sent",
    "T10 Determine necessity to stop indication": "decided",
}


def _rows() -> list[dict[str, str]]:
    """The rows of the log by their time; rows of one time as they stand."""
    if not RECEIPT.is_file():
        missing(f"the event log {RECEIPT} is not here")
    with RECEIPT.open(newline="") as file:
        return sorted(csv.DictReader(file), key=_when)


def _when(row: dict[str, str]) -> datetime.datetime:
    return datetime.datetime.fromisoformat(row["time:timestamp"])


def _expected(rows: list[dict[str, str]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = row["concept:name"]
        case = found.setdefault(
            row["case:concept:name"], {"events": 0, "firstEvent": name, "resources": set(), "status": "received"}
        )
        case["events"] += 1
        case["lastEvent"] = name
        case["lastAt"] = max(case.get("lastAt", _when(row)), _when(row))
        case["resources"].add(row["org:resource"])
        case["status"] = STATUS.get(name, case["status"])
    return found


async def _shown(database: Database) -> dict[str, dict[str, Any]]:
    """The read model, through the view."""
    fields = ("events", "firstEvent", "lastEvent", "lastAt", "resources", "status")
    found = {}
    async for document in database["permits"].find():
        assert len(document["resources"]) == len(set(document["resources"]))
        found[document["_id"]] = {name: document[name] for name in fields} | {"resources": set(document["resources"])}
    return found


async def test_a_real_log_with_a_projector_that_is_killed_on_the_way(
    mongodb_uri: str, client: Client, database_name: str, tmp_path: Path
) -> None:
    rows = _rows()
    chance = random.Random(seeded(8_577))
    slices = [tmp_path / f"{number}.csv" for number in range(KILLS + 1)]
    for number, path in enumerate(slices):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows[len(rows) * number // len(slices) : len(rows) * (number + 1) // len(slices)])
    database = open_database(client, database_name)
    env = environment(mongodb_uri, database_name, PROJECTOR_LEASE_SECONDS="0.5")
    arguments = ("run", "--projections", str(ROOT / "examples" / "receipt"))

    async def applied() -> int:
        """Events in the documents of the build, whether readers see it yet or not."""
        cursor = await database["permits.v1"].aggregate([{"$group": {"_id": None, "events": {"$sum": "$events"}}}])
        return sum([row["events"] async for row in cursor])

    async with local_appender(mongodb_uri, database_name) as api:
        appended = 0
        for path in slices[:KILLS]:
            with ProjectorProcess.run(*arguments, env=env) as projector:
                importing = asyncio.create_task(import_file(path, api.url, clients=16))
                before = await applied()
                # At the start, in the middle of catching up, and sometimes when there is nothing to do.
                if chance.random() < 0.7:

                    async def moved(before: int = before, projector: ProjectorProcess = projector) -> bool:
                        assert projector.process.poll() is None, "".join(projector.output)
                        return await applied() > before

                    await eventually(moved, "the projector applies something")
                await asyncio.sleep(chance.uniform(0, 0.5))
                assert projector.end(signal.SIGKILL) == -signal.SIGKILL, "".join(projector.output)
                appended += (await importing).appended
        with ProjectorProcess.run(*arguments, env=env) as projector:
            appended += (await import_file(slices[-1], api.url, clients=16)).appended
            assert appended == len(rows) == 8_577

            async def complete() -> bool:
                return await _shown(database) == _expected(rows)

            await eventually(complete, "the read model is what the log says")
            assert await applied() == 8_577  # each event once
            verified = await asyncio.to_thread(
                subprocess.run, [*PROJECTOR, "verify", "permits"], env=env, capture_output=True, text=True, check=False
            )
            assert verified.returncode == 0, verified.stdout + verified.stderr
            assert "1434 documents compared" in verified.stdout

            assert projector.end() == 0, "".join(projector.output)
    for collection in ("leases", "replicas"):
        assert await database[f"projector.{collection}"].count_documents({}) == 0
    assert await _shown(database) == _expected(rows)
    await client.drop_database(database_name)
