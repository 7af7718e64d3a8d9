"""Runs in a pod beside the appender: appends for a time and checks every answer against the log in the end.

`load.py PREFIX SECONDS AGGREGATES`: the aggregates' names begin with the prefix. An append is repeated with its eventIds
until it is acknowledged; in the end each aggregate's history must hold what was acknowledged, where it was acknowledged,
once, and nothing else. Prints its result as JSON.
"""

from __future__ import annotations

import asyncio
import collections
import json
import sys
import time
import uuid

import aiohttp

URL = "http://127.0.0.1:8080"


async def append(
    session: aiohttp.ClientSession, aggregate: str, counts: collections.Counter[str]
) -> list[tuple[str, int]]:
    """Two events, all or nothing; returns their ids and numbers as acknowledged."""
    events = [
        {"eventId": str(uuid.uuid4()), "eventName": "Loaded", "payload": {"org:group": "load", "org:resource": "load"}}
        for _ in range(2)
    ]
    deadline = time.monotonic() + 120
    while True:
        try:
            async with session.post(f"{URL}/v1/aggregates/{aggregate}/events", json={"events": events}) as response:
                if response.status in {200, 201}:
                    answer = await response.json()
                    return [(each["eventId"], each["sequenceNo"]) for each in answer["events"]]
                counts[f"answered {response.status}"] += 1
                if response.status != 503:
                    raise SystemExit(f"{response.status} {await response.text()}")
        except (aiohttp.ClientError, TimeoutError) as error:
            counts[type(error).__name__] += 1
        if time.monotonic() > deadline:
            raise SystemExit(f"not acknowledged in time: {aggregate} {dict(counts)}")
        await asyncio.sleep(0.2)


async def history(session: aiohttp.ClientSession, aggregate: str) -> list[tuple[str, int]]:
    """All events of an aggregate, page by page."""
    found: list[tuple[str, int]] = []
    while True:
        after = found[-1][1] if found else 0
        async with session.get(f"{URL}/v1/aggregates/{aggregate}/events?after={after}&limit=500") as response:
            page = [(each["eventId"], each["sequenceNo"]) for each in (await response.json())["events"]]
        found += page
        if len(page) < 500:
            return found


async def main(prefix: str, seconds: float, aggregates: int) -> None:
    """Eight writers, each with aggregates of its own, at a pace that leaves the machine room for the rest."""
    counts: collections.Counter[str] = collections.Counter()
    acknowledged: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    until = time.monotonic() + seconds
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(30)) as session:

        async def write(number: int) -> None:
            turn = 0
            while time.monotonic() < until:
                aggregate = f"{prefix}-{number}-{turn % aggregates}"
                acknowledged[aggregate].extend(await append(session, aggregate, counts))
                turn += 1
                await asyncio.sleep(0.05)

        await asyncio.gather(*(write(number) for number in range(8)))
        for aggregate, sent in acknowledged.items():
            stored = await history(session, aggregate)
            if stored != sent or [number for _, number in stored] != list(range(1, len(stored) + 1)):
                raise SystemExit(
                    f"{aggregate}: {len(sent)} events acknowledged, {len(stored)} in the log; {dict(counts)}"
                )
    events = sum(map(len, acknowledged.values()))
    print(json.dumps({"events": events, "aggregates": len(acknowledged), "repeats": dict(counts)}), flush=True)


asyncio.run(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
