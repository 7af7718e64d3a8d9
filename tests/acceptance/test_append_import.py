"""`appender import` against a running appender: a real event log, and the ways it can end."""

from __future__ import annotations

import asyncio
import csv
import datetime
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from eventstore import log
from eventstore.event import EVENTS
from tests.appending import Process, local_appender
from tests.conftest import missing

if TYPE_CHECKING:
    from eventstore.client import Database

RECEIPT = Path(__file__).parents[3] / "shared" / "data" / "receipt.csv"


async def run_import(*arguments: str) -> tuple[int, str]:
    """Exit code and output of the command."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "from appender.cli import main; main()",
        "import",
        *arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    output, errors = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode is not None
    return process.returncode, output.decode() + errors.decode()


async def test_a_real_event_log_by_16_clients(mongodb_uri: str, database: Database) -> None:
    if not RECEIPT.is_file():
        missing(f"the event log {RECEIPT} is not here")
    with RECEIPT.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows.sort(key=lambda row: datetime.datetime.fromisoformat(row["time:timestamp"]))
    expected: dict[str, list[tuple[str, str, str]]] = {}
    for row in rows:
        what = (row["concept:name"], row["concept:instance"], row["org:resource"])
        expected.setdefault(row["case:concept:name"], []).append(what)
    assert (len(rows), len(expected)) == (8_577, 1_434)

    async with local_appender(mongodb_uri, database.name) as api:
        arguments = (str(RECEIPT), "--url", api.url, "--order", "timestamp", "--clients", "16")
        code, output = await run_import(*arguments)
        assert code == 0, output
        assert output.startswith("8577 appended, 0 already there, 0 failed")
        stored: dict[str, list[tuple[str, str, str]]] = {}
        async for event in database[EVENTS].find().sort({"aggregateId": 1, "sequenceNo": 1}):
            case = stored.setdefault(event["aggregateId"], [])
            assert event["sequenceNo"] == len(case) + 1
            payload = event["payload"]
            case.append((event["eventName"], payload["concept:instance"], payload["org:resource"]))
        assert stored == expected

        code, output = await run_import(*arguments)
        assert code == 0
        assert output.startswith("0 appended, 8577 already there, 0 failed")
        assert await database[EVENTS].count_documents({}) == 8_577


async def test_an_interrupted_import_is_completed_by_the_next(
    mongodb_uri: str, database: Database, tmp_path: Path
) -> None:
    lines = ["aggregateId,eventName,n"] + [f"a{n % 7},counted,{n}" for n in range(700)]
    path = tmp_path / "log.csv"
    path.write_text("\n".join(lines[:451]) + "\n")
    async with local_appender(mongodb_uri, database.name) as api:
        assert (await run_import(str(path), "--url", api.url, "--clients", "3"))[0] == 0
        path.write_text("\n".join(lines) + "\n")
        code, output = await run_import(str(path), "--url", api.url, "--clients", "5")
        assert code == 0
        assert output.startswith("250 appended, 450 already there")
    for aggregate in range(7):
        events = await log.history(database, f"a{aggregate}")
        assert [e["payload"]["n"] for e in events] == [str(n) for n in range(aggregate, 700, 7)]


async def test_what_is_refused_is_told_by_line(mongodb_uri: str, database: Database, tmp_path: Path) -> None:
    path = tmp_path / "log.ndjson"
    path.write_text(
        '{"aggregateId":"a","eventName":"x","payload":{}}\n'
        '{"aggregateId":"a","eventName":"","payload":{}}\n'
        '{"aggregateId":"a","eventName":"z","payload":{"$set":1}}\n'
        '{"aggregateId":"a","eventName":"y","payload":{}}\n'
    )
    async with local_appender(mongodb_uri, database.name) as api:
        code, output = await run_import(str(path), "--url", api.url)
    assert code == 1
    assert "2 appended, 0 already there, 2 failed" in output
    assert "line 2: 422" in output
    assert "line 3: 422" in output
    assert "$set" in output


async def test_a_bad_file_ends_with_2(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("a,b\n1,2\n")
    code, output = await run_import(str(path))
    assert code == 2
    assert "--aggregate-id" in output


async def test_an_import_outlives_a_restart_of_the_appender(
    mongodb_uri: str, database: Database, tmp_path: Path
) -> None:
    path = tmp_path / "log.csv"
    path.write_text("aggregateId,eventName,n\n" + "".join(f"a{n % 50},counted,{n}\n" for n in range(20_000)))
    with Process.several(1, mongodb_uri, database.name) as (appender,):
        importing = asyncio.create_task(run_import(str(path), "--url", appender.url))
        for _ in range(3):
            before = await database[EVENTS].estimated_document_count()
            while await database[EVENTS].estimated_document_count() == before and not importing.done():
                await asyncio.sleep(0.01)
            appender.kill()
            appender.start()
        code, output = await importing
    assert code == 0, output
    assert "0 failed" in output
    for aggregate in range(50):
        events = await log.history(database, f"a{aggregate}")
        assert [e["payload"]["n"] for e in events] == [str(n) for n in range(aggregate, 20_000, 50)]
        assert [e["sequenceNo"] for e in events] == list(range(1, 401))


def test_the_command_explains_settings_that_do_not_fit() -> None:
    found = subprocess.run(
        [sys.executable, "-c", "from appender.cli import main; main()", "serve"],
        env=os.environ | {"APPENDER_HOST": "0.0.0.0", "APPENDER_TOKEN_FILE": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == 1
    assert "APPENDER_TOKEN_FILE" in found.stderr
