"""What `bench.append` runs as processes of their own: the peers, which one would write in an afternoon, the ceilings, and
the generator of streams of lines.

`python -m bench.append_peers NAME ARGUMENT …`, with MONGODB_URI and EVENTSTORE_DATABASE; prints a line of JSON.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import random
import sys
import time
from typing import TYPE_CHECKING, Any, TypeAlias

import aiohttp
import msgspec
import uvloop
from aiohttp import web
from bson.int64 import Int64
from pydantic import SecretStr
from pymongo.errors import PyMongoError

from appender.committer import Committer
from appender.endpoint import Endpoints
from appender.lanes import Request
from appender.metrics import Metrics
from appender.requests import Appended, AppendedEvent, AppendRequest
from appender.routes import Routes
from appender.settings import AppenderSettings
from eventstore.client import MAJORITY, Client, Database, connect, open_database
from eventstore.event import EVENTS, new_event_id, slot_of
from eventstore.indexes import provision

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from appender.encoding import Append

__all__ = ["PAYLOAD"]

Figures: TypeAlias = dict[str, float]

PAYLOAD = {"status": "open", "amount": 12.5, "customer": "c-4711", "items": 3, "note": "as agreed on the phone"}

_decoder = msgspec.json.Decoder(AppendRequest)
_encoder = msgspec.json.Encoder()
_JSON = {"Content-Type": "application/json"}


def document(aggregate_id: str, sequence_no: int, payload: dict[str, Any] = PAYLOAD) -> dict[str, Any]:
    """An event document, made without any of the appender's code."""
    return {
        "_id": new_event_id(),
        "aggregateId": aggregate_id,
        "sequenceNo": Int64(sequence_no),
        "eventName": "happened",
        "timestamp": datetime.datetime.now(datetime.UTC),
        "payload": payload,
        "slot": slot_of(aggregate_id),
    }


def _answer(aggregate_id: str, event_id: str, sequence_no: int) -> web.Response:
    body = _encoder.encode(Appended(aggregate_id, sequence_no, sequence_no, [AppendedEvent(event_id, sequence_no)]))
    return web.Response(body=body, status=201, headers=_JSON)


def bare() -> web.Application:
    """As little as aiohttp allows: reads and decodes the body, answers."""

    async def append(request: web.Request) -> web.Response:
        wanted = _decoder.decode(await request.read())
        return _answer(request.match_info["id"], wanted.events[0].event_id or new_event_id(), 1)

    app = web.Application()
    app.router.add_post("/v1/aggregates/{id}/events", append)
    return app


class _StoresNothing(Committer):
    """Answers each append at once, as if it were written."""

    async def append(self, appends: Sequence[Append]) -> Request:
        for each in appends:
            each.first = 1
        return Request(appends, 0.0, 0.0, lambda _: None)


async def without_storing(client: Client, database: Database) -> web.Application:
    """The appender's own routes, with all their checks, encoding and metrics, up to where they would store."""
    settings, metrics = AppenderSettings(), Metrics()
    app = web.Application(client_max_size=settings.max_request_bytes)
    committer = _StoresNothing(client, database, settings, metrics)
    Routes(committer, database, settings).add_to(app, Endpoints(metrics, None), b"{}")
    return app


def insert_one(database: Database) -> web.Application:
    """One `insert_one` per request; the numbers come from memory, which only one process with no past could do."""
    heads: dict[str, int] = {}

    async def append(request: web.Request) -> web.Response:
        wanted = _decoder.decode(await request.read())
        aggregate_id = request.match_info["id"]
        heads[aggregate_id] = number = heads.get(aggregate_id, 0) + 1
        made = document(aggregate_id, number, wanted.events[0].payload)
        await database[EVENTS].insert_one(made)
        return _answer(aggregate_id, made["_id"], number)

    app = web.Application()
    app.router.add_post("/v1/aggregates/{id}/events", append)
    return app


async def transactions(client: Client, database: Database, in_flight: int, aggregates: int, seconds: float) -> Figures:
    """A transaction per event: read the head, insert the next number, commit; tried ten times with jittered pauses, as
    users' retry loops do.
    """
    latencies: list[float] = []
    failed = 0
    end = time.perf_counter() + seconds
    collection = database[EVENTS]

    async def once(aggregate_id: str) -> None:
        async with client.start_session() as session, await session.start_transaction(write_concern=MAJORITY):
            found = await collection.find_one(
                {"aggregateId": aggregate_id},
                {"sequenceNo": 1},
                sort=[("aggregateId", -1), ("sequenceNo", -1)],
                session=session,
            )
            number = (found["sequenceNo"] if found else 0) + 1
            await collection.insert_one(document(aggregate_id, number), session=session)

    async def writer() -> None:
        nonlocal failed
        while time.perf_counter() < end:
            aggregate_id = f"a{random.randrange(aggregates)}"
            started = time.perf_counter()
            for attempt in range(10):
                try:
                    await once(aggregate_id)
                    latencies.append(time.perf_counter() - started)
                    break
                except PyMongoError:
                    await asyncio.sleep(random.uniform(0, min(0.5, 0.005 * 2**attempt)))
            else:
                failed += 1

    started = time.perf_counter()
    await asyncio.gather(*(writer() for _ in range(in_flight)))
    return figures(latencies, time.perf_counter() - started, failed)


async def insert_many(database: Database, seconds: float, at_once: int) -> Figures:
    """`insert_many` of 1,000 documents over 1,000 aggregates; making the documents is not counted, encoding them is."""
    run = new_event_id()
    written, number, spent = 0, 0, 0.0
    while spent < seconds:
        number += 1
        batches = [[document(f"{run}{part}.{n}", number) for n in range(1_000)] for part in range(at_once)]
        started = time.perf_counter()
        await asyncio.gather(*(database[EVENTS].insert_many(batch, ordered=False) for batch in batches))
        spent += time.perf_counter() - started
        written += 1_000 * at_once
    return {"rate": written / spent}


async def bulk(url: str, lines_count: int, aggregates: int) -> Figures:
    """A stream of lines, prepared, over so many aggregates; answers are read while it is sent."""
    run = new_event_id()
    payload = msgspec.json.encode(PAYLOAD).decode()
    chunks = [
        "".join(
            f'{{"aggregateId":"{run}{n % aggregates}","eventName":"happened","payload":{payload}}}\n'
            for n in range(start, min(lines_count, start + 1_000))
        ).encode()
        for start in range(0, lines_count, 1_000)
    ]

    async def body() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    answered = appended = 0
    tail = b""
    started = time.perf_counter()
    headers = {"Content-Type": "application/x-ndjson"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{url}/v1/events", data=body(), headers=headers) as response,
    ):
        async for chunk in response.content.iter_any():
            lines, _, tail = (tail + chunk).rpartition(b"\n")
            answered += lines.count(b"\n") + (1 if lines else 0)
            appended += lines.count(b'"status":201')
    return {"rate": answered / (time.perf_counter() - started), "failed": answered - appended}


def figures(latencies: list[float], seconds: float, failed: int) -> Figures:
    """Rate, and latencies in milliseconds."""
    ordered = sorted(latencies) or [0.0]

    def at(fraction: float) -> float:
        return ordered[min(len(ordered) - 1, int(len(ordered) * fraction))] * 1e3

    return {
        "rate": len(latencies) / seconds,
        "p50": at(0.5),
        "p99": at(0.99),
        "max": ordered[-1] * 1e3,
        "failed": failed,
    }


async def _serve(app: web.Application, port: int) -> None:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


async def _main(name: str, arguments: list[str]) -> None:
    async with connect(SecretStr(os.environ["MONGODB_URI"]), "bench") as client:
        database = open_database(client, os.environ["EVENTSTORE_DATABASE"])
        numbers = [float(each) for each in arguments if not each.startswith("http")]
        match name:
            case "prepare":
                await provision(database)
                found = {}
            case "bare":
                await _serve(bare(), int(numbers[0]))
            case "without-storing":
                await _serve(await without_storing(client, database), int(numbers[0]))
            case "insert-one":
                await _serve(insert_one(database), int(numbers[0]))
            case "transactions":
                found = await transactions(client, database, int(numbers[0]), int(numbers[1]), numbers[2])
            case "insert-many":
                found = await insert_many(database, numbers[0], int(numbers[1]))
            case "bulk":
                found = await bulk(arguments[0], int(numbers[0]), int(numbers[1]))
        print(json.dumps(found))


if __name__ == "__main__":
    uvloop.run(_main(sys.argv[1], sys.argv[2:]))
