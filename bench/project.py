"""The live projector: events per second until the read model is right, and milliseconds until an event is visible.

`python -m bench.project [live] [latency] [growth] [many]` (default: all) prints markdown tables for bench/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import multiprocessing
import os
import statistics
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from pymongo import MongoClient

from bench import logs, project_ours, project_peers
from eventstore.embedded import ReplicaSet
from eventstore.event import EVENTS
from projector.checkpoint import CHECKPOINTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from pymongo.database import Database

Document = dict[str, Any]

EVENTS_COUNT: Final = 100_000
TURNS: Final = int(os.environ.get("TURNS", "3"))
"""All but the naive loop are measured in turns, and ratios are taken within a turn: what else the machine does weighs on both."""

NAIVE_EVENTS: Final = 3_000
"""The naive loop needs five minutes for all: it is as fast at the begin as at the end."""

LATENCY_PER_SECOND: Final = 500
LATENCY_SECONDS: Final = 20
LATENCY_AGGREGATES: Final = 1_000
MANY: Final = 20
MANY_EVENTS: Final = 20_000
GROWTH: Final = (10_000, 100_000, 1_000_000, 2_000_000)

_SPAWN: Final = multiprocessing.get_context("spawn")


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a new process."""
    with ProcessPoolExecutor(1, _SPAWN) as pool:
        return pool.submit(function, *arguments).result()


@contextlib.contextmanager
def mongodb(cache_gib: float = 1.0) -> Iterator[MongoClient[Document]]:
    """One mongod; the client of it has the connection string as `uri`."""
    with ReplicaSet(cache_gib=cache_gib) as replica_set, MongoClient(replica_set.uri, tz_aware=True) as client:
        yield client


def uri_of(client: MongoClient[Document]) -> str:
    """Its connection string."""
    host, port = client.address or ("", 0)
    return f"mongodb://{host}:{port}/?replicaSet=rs0"


def token_now(database: Database[Document]) -> Document:
    """The position after everything in the log."""
    with database[EVENTS].watch() as stream:
        stream.try_next()
        token = stream.resume_token
    if token is None:
        raise RuntimeError("no resume token")
    return dict(token)


def table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Prints a table in markdown."""
    heads = list(heads)
    print("| " + " | ".join(heads) + " |")
    print("| " + " | ".join(["---"] + ["---:"] * (len(heads) - 1)) + " |")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)
    print()


def per_second(events: int, seconds: float) -> str:
    """A rate as a text."""
    return f"{events / seconds:,.0f}"


# Live


INTERLEAVINGS: Final[dict[str, Callable[[int], Iterable[Document]]]] = {
    "worst: 10,000 aggregates in turn": lambda count: logs.round_robin(count, count // 10),
    "real: receipt.csv": logs.receipt,
    "ten aggregates": lambda count: logs.round_robin(count, 10),
}


def live(client: MongoClient[Document]) -> None:
    """Events per second, ours and the peers'."""
    rows = []
    for title, events in INTERLEAVINGS.items():
        if events is logs.receipt and not logs.RECEIPT.is_file():
            print(f"(without {logs.RECEIPT.name}: it is not there)\n")
            continue
        rows.append([title, *_live(client, events)])
    heads = ["interleaving", "**projector**", "naive loop", "batched by hand", "stream drained", "stream raw"]
    table(
        [*heads, "documents alone", "x naive", "x batched", "of the slower ceiling", "MiB"],
        rows,
    )


def _live(client: MongoClient[Document], events: Callable[[int], Iterable[Document]]) -> list[str]:
    name, uri = "live", uri_of(client)
    database = client[name]
    rates: dict[str, list[float]] = {}

    def begin() -> Document:
        """A log of its own for each: what others have written meanwhile, a stream would have to pass over at its end."""
        logs.provision(database)
        apart(project_ours.begin, uri, name, 1)
        token: Document = database[CHECKPOINTS].find_one({}, {"token": 1})["token"]  # type: ignore[index]
        logs.write(database, events(EVENTS_COUNT))
        return token

    def measure(peer: Callable[..., float], size: int = EVENTS_COUNT) -> None:
        rates.setdefault(peer.__name__, []).append(size / apart(peer, uri, name, begin(), size))
        if peer in (project_peers.batched, project_peers.documents_alone):
            logs.check(database, project_peers.MODEL, EVENTS_COUNT)

    measure(project_peers.naive, NAIVE_EVENTS)
    ours: list[float] = []
    batched: list[float] = []
    ceilings: list[float] = []
    for turn in range(TURNS):
        measure(project_peers.batched)
        measure(project_peers.drained)
        measure(project_peers.drained_raw)
        measure(project_peers.documents_alone)
        begin()
        found = apart(project_ours.follow, uri, name, 1, EVENTS_COUNT)
        logs.check(database, project_ours.names(1)[0], EVENTS_COUNT)
        ours.append(EVENTS_COUNT / found["seconds"])
        batched.append(ours[turn] / rates["batched"][turn])
        ceilings.append(ours[turn] / min(rates["drained"][turn], rates["documents_alone"][turn]))
    rate = statistics.median(ours)
    return [
        f"**{rate:,.0f}**",
        *(f"{statistics.median(each):,.0f}" for each in rates.values()),
        f"{rate / rates['naive'][0]:.0f}",
        f"{statistics.median(batched):.1f}",
        f"{statistics.median(ceilings):.0%}",
        f"{found['memory'] / 2**20:.0f}",
    ]


# Latency


def latency(client: MongoClient[Document]) -> None:
    """Milliseconds from before the append to the read model's own change, seen through a change stream on it."""
    uri = uri_of(client)
    rows = []
    for title in ("change stream + one update", "projector"):
        database = client["latency"]
        logs.provision(database)
        ready, over = _SPAWN.Event(), _SPAWN.Event()
        count = LATENCY_PER_SECOND * LATENCY_SECONDS
        if title == "projector":
            process = _SPAWN.Process(target=project_ours.latency, args=(uri, database.name, ready, over))
            process.start()
            ready.wait(60)
            model = "sent.v1"
        else:
            arguments = (uri, database.name, token_now(database), count)
            process = _SPAWN.Process(target=project_peers.bare_latency, args=arguments)
            process.start()
            model = project_peers.MODEL
            database.create_collection(model)
        delays = _delays(database, model, count)
        over.set()
        process.join()
        cuts = statistics.quantiles(delays, n=1000)
        rows.append((title, cuts[499], cuts[949], cuts[989], max(delays)))
    bare, ours = rows
    ratios = ("ratio", *(f"{ours[column] / bare[column]:.1f}" for column in range(1, 5)))
    shown = [(row[0], *(f"{cell:.1f}" for cell in row[1:])) for row in rows]
    table([f"ms at {LATENCY_PER_SECOND} events/s", "p50", "p95", "p99", "most"], [*shown, ratios])


def _delays(database: Database[Document], model: str, count: int) -> list[float]:
    """Appends at a steady pace, and notes when the read model shows what was appended."""
    delays: list[float] = []
    fields = {"sentAt": {"$ifNull": ["$fullDocument.sentAt", "$updateDescription.updatedFields.sentAt"]}}
    opened = threading.Event()

    def observe() -> None:
        last = -1.0
        with database[model].watch([{"$project": fields}], max_await_time_ms=100) as stream:
            stream.try_next()
            opened.set()
            while stream.alive and last < count - 1:
                change = stream.try_next()
                if change is not None:
                    last = change["sentAt"]["number"]
                    delays.append(1e3 * (time.time() - change["sentAt"]["at"]))

    observer = threading.Thread(target=observe)
    observer.start()
    opened.wait(30)
    begun = time.perf_counter()
    for number, event in enumerate(logs.round_robin(count, LATENCY_AGGREGATES)):
        due = begun + number / LATENCY_PER_SECOND
        time.sleep(max(0.0, due - time.perf_counter()))
        event["payload"]["sentAt"] = {"number": number, "at": time.time()}
        event["timestamp"] = datetime.datetime.now(datetime.UTC)
        database[EVENTS].insert_one(event)
    observer.join(60)
    if observer.is_alive():
        raise RuntimeError(f"only {len(delays)} of {count} events were seen")
    return delays


# Cost as work grows


def growth(client: MongoClient[Document]) -> None:
    """Events per second from the first event to the last of a long log, in one go; 10,000 aggregates are at work at any time."""
    database = client["growth"]
    logs.provision(database)
    apart(project_ours.begin, uri_of(client), database.name, 1)
    count = logs.write(database, logs.round_robin(GROWTH[-1], GROWTH[-1] // 10, GROWTH[-1] // EVENTS_COUNT))
    found = apart(project_ours.follow, uri_of(client), database.name, 1, count)
    rows = []
    before = (0.0, 0)
    for size in GROWTH:
        at = next(each for each in found["reached"] if each[1] >= size)
        title = f"to {size:,}" + (" (with its start)" if not rows else "")
        rows.append((title, per_second(at[1] - before[1], at[0] - before[0])))
        before = at
    table(["events", "events/s"], [*rows, ("most memory, MiB", f"{found['memory'] / 2**20:.0f}")])


def many(client: MongoClient[Document]) -> None:
    """Twenty projections in one process against one: the sum over all of what they applied."""
    rows = []
    for projections in (1, MANY):
        database = client["many"]
        logs.provision(database)
        apart(project_ours.begin, uri_of(client), database.name, projections)
        count = logs.write(database, logs.round_robin(MANY_EVENTS, MANY_EVENTS // 10))
        found = apart(project_ours.follow, uri_of(client), database.name, projections, count)
        rate = projections * count / found["seconds"]
        rows.append((projections, rate, f"{rate:,.0f}", f"{found['memory'] / 2**20:.0f}"))
    ratio = rows[1][1] / rows[0][1]
    table(
        ["projections", "events/s, sum", "MiB"], [*((row[0], *row[2:]) for row in rows), ("ratio", f"{ratio:.2f}", "")]
    )


PARTS: Final[dict[str, Callable[[MongoClient[Document]], None]]] = {
    "live": live,
    "latency": latency,
    "many": many,
    "growth": growth,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all")
    for part in parser.parse_args().parts or PARTS:
        with mongodb() as mongo:
            PARTS[part](mongo)
