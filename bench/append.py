"""The append path beside its peers, on one mongod, in one run. `python -m bench.append [rate] [bulk] [latency] [memory]`.

Everything that is compared is measured in turns of two seconds, again and again; the tables show medians of the turns, and
ratios are medians of the ratios within a turn, so that what else the machine does weighs on both sides.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.error import URLError

import psutil

from bench.append_peers import PAYLOAD
from eventstore.embedded import ReplicaSet, free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

TURNS: Final = int(os.environ.get("TURNS", "5"))
SECONDS: Final = 2
IN_FLIGHT: Final = (1, 16, 64, 256)
WARM: Final = 64
"""In flight while a server warms up."""

VEGETA: Final = shutil.which("vegeta") or str(Path(sys.executable).with_name("vegeta"))

BULK_LINES: Final = 100_000
MEMORY_APPENDS: Final = 1_000_000
MEMORY_STEP: Final = 100_000
NAMES: Final = 1_000_000_000
"""Aggregates to take at random: of a million appends, five hundred or so meet one that was there before."""

BODY: Final = json.dumps({"events": [{"eventName": "happened", "payload": PAYLOAD}]}, separators=(",", ":"))

Figures = dict[str, float]


@dataclass
class Server:
    """A process that answers appends."""

    url: str
    process: subprocess.Popen[bytes]


def environment(uri: str, database: str) -> dict[str, str]:
    """Of a process of ours or a peer's."""
    return os.environ | {"MONGODB_URI": uri, "EVENTSTORE_DATABASE": database, "LOG_LEVEL": "error"}


@contextlib.contextmanager
def server(name: str, uri: str, database: str) -> Iterator[Server]:
    """`appender`, or a peer by its name, listening."""
    port = free_port()
    if name == "appender":
        command = [sys.executable, "-c", "from appender.cli import main; main()", "serve"]
    else:
        command = [sys.executable, "-m", "bench.append_peers", name, str(port)]
    env = environment(uri, database) | {"APPENDER_PORT": str(port)}
    process = subprocess.Popen(command, env=env)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/readyz"):
                break
        except URLError as error:
            if getattr(error, "code", 503) != 503:  # a peer, which has no such route
                break
            time.sleep(0.05)
    try:
        yield Server(url, process)
    finally:
        process.kill()
        process.wait()


def wrk(url: str, in_flight: int, aggregates: int) -> Figures:
    """wrk for two seconds: one thread of it asks far more than a Python process can answer."""
    env = os.environ | {"AGGREGATES": str(aggregates), "BODY": BODY, "SEED": str(time.monotonic_ns() % 2**31)}
    command = ["wrk", "-t1", f"-c{in_flight}", f"-d{SECONDS}s", "--timeout", "30s", "-s", "bench/append.lua", url]
    output = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    found: Figures = json.loads(output.splitlines()[-1])
    return found | {"rate": found["requests"] / found["seconds"]}


def vegeta(url: str, rate: float, aggregates: int) -> Figures:
    """Requests at a fixed rate whatever the answers do (open loop), in its own process, at a fraction of the CPU time that a
    generator in Python would take from what is measured.
    """
    body = base64.b64encode(BODY.encode()).decode()
    headers = {"Content-Type": ["application/json"]}
    targets = [
        json.dumps({"method": "POST", "url": f"{url}/v1/aggregates/a{n}/events", "body": body, "header": headers})
        + "\n"
        for n in random.sample(range(aggregates), aggregates)
    ]
    attack = [VEGETA, "attack", "-format=json", f"-rate={rate:.0f}/1s", f"-duration={2 * SECONDS}s", "-timeout=30s"]
    results = subprocess.run(attack, input="".join(targets).encode(), check=True, capture_output=True).stdout
    report = subprocess.run([VEGETA, "report", "-type=json"], input=results, check=True, capture_output=True).stdout
    found = json.loads(report)
    latencies = found["latencies"]  # nanoseconds
    return {
        "rate": found["rate"],
        "p50": latencies["50th"] / 1e6,
        "p99": latencies["99th"] / 1e6,
        "max": latencies["max"] / 1e6,
        "failed": found["requests"] - found["status_codes"].get("201", 0),
    }


def apart(uri: str, database: str, *arguments: object) -> Figures:
    """A peer or generator that ends by itself, in a process of its own."""
    command = [sys.executable, "-m", "bench.append_peers", *map(str, arguments)]
    env = environment(uri, database)
    output = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    found: Figures = json.loads(output.splitlines()[-1])
    return found


class Turns:
    """Figures by name, a list of turns each."""

    def __init__(self) -> None:
        self.found: dict[str, list[Figures]] = {}

    def add(self, name: str, figures: Figures) -> None:
        """One turn of one of those that are compared."""
        self.found.setdefault(name, []).append(figures)

    def median(self, name: str, what: str) -> float:
        """Over the turns."""
        return statistics.median(each[what] for each in self.found[name])

    def ratio(self, name: str, other: str, what: str = "rate") -> float:
        """Median of the turns' ratios."""
        return statistics.median(
            mine[what] / theirs[what] for mine, theirs in zip(self.found[name], self.found[other], strict=True)
        )

    def failed(self, name: str) -> int:
        """In all turns."""
        return int(sum(each["failed"] for each in self.found[name]))


def rate() -> None:
    """Requests a second, with so many in flight, over 1,000 aggregates and on one."""
    for aggregates in (1_000, 1):
        where = "1,000 aggregates" if aggregates > 1 else "one aggregate"
        print(f"\n### {where}\n")
        head = (
            "in flight",
            "appender /s",
            "p50 ms",
            "p99 ms",
            "failed",
            "(a) transactions /s",
            "failed",
            "(b) insert_one /s",
            "p50 ms",
            "(c) without storing /s",
            "bare handler /s",
            "ours/(a)",
            "ours/(b)",
            "ours/(c)",
            "ours/bare",
        )
        print(f"| {' | '.join(head)} |")
        print("| --- " * 15 + "|")
        for in_flight in IN_FLIGHT:
            turns = Turns()
            # A mongod of its own for each line: the log that grew before would weigh on the later ones.
            with (
                ReplicaSet(cache_gib=1.0) as mongod,
                server("appender", mongod.uri, "ours") as ours,
                server("insert-one", mongod.uri, "insert_one") as insert_one,
                server("without-storing", mongod.uri, "none") as ceiling,
                server("bare", mongod.uri, "none") as bare,
            ):
                apart(mongod.uri, "insert_one", "prepare")
                apart(mongod.uri, "transactions", "prepare")
                # Known aggregates on both sides: (b) keeps their numbers in memory from the start.
                wrk(ours.url, WARM, aggregates)
                wrk(insert_one.url, WARM, aggregates)
                for _ in range(TURNS):
                    turns.add("ours", wrk(ours.url, in_flight, aggregates))
                    turns.add("c", wrk(ceiling.url, in_flight, aggregates))
                    turns.add("bare", wrk(bare.url, in_flight, aggregates))
                    turns.add("b", wrk(insert_one.url, in_flight, aggregates))
                    turns.add("a", apart(mongod.uri, "transactions", "transactions", in_flight, aggregates, SECONDS))
            m = turns.median
            print(
                f"| {in_flight} | {m('ours', 'rate'):,.0f} | {m('ours', 'p50'):.1f} | {m('ours', 'p99'):.1f} |"
                f" {turns.failed('ours')} | {m('a', 'rate'):,.0f} | {turns.failed('a')} | {m('b', 'rate'):,.0f} |"
                f" {m('b', 'p50'):.1f} | {m('c', 'rate'):,.0f} | {m('bare', 'rate'):,.0f} | {turns.ratio('ours', 'a'):.1f} |"
                f" {turns.ratio('ours', 'b'):.1f} | {turns.ratio('ours', 'c'):.0%} |"
                f" {turns.ratio('ours', 'bare'):.0%} |",
                flush=True,
            )


def bulk() -> None:
    """Streams of lines against `insert_many`."""
    print("\n### Streams of lines\n")
    print("| | events/s | of (d) |\n| --- | --- | --- |")
    turns = Turns()
    with ReplicaSet(cache_gib=1.0) as mongod, server("appender", mongod.uri, "ours") as ours:
        apart(mongod.uri, "many", "prepare")
        apart(mongod.uri, "none", "bulk", ours.url, 10_000, 1_000)
        for _ in range(TURNS):
            turns.add("(d) insert_many of 1,000", apart(mongod.uri, "many", "insert-many", SECONDS, 1))
            turns.add("the same, two at a time", apart(mongod.uri, "many", "insert-many", SECONDS, 2))
            for aggregates, where in ((1_000, "1,000 aggregates"), (1, "one aggregate")):
                figures = apart(mongod.uri, "none", "bulk", ours.url, BULK_LINES, aggregates)
                assert figures["failed"] == 0
                turns.add(f"a stream over {where}", figures)
    for name in turns.found:
        print(f"| {name} | {turns.median(name, 'rate'):,.0f} | {turns.ratio(name, '(d) insert_many of 1,000'):.0%} |")


def latency() -> None:
    """At half of the top rate, open loop."""
    print("\n### Latency at half of the top rate (open loop)\n")
    print("| | requests/s | p50 ms | p99 ms | max ms | failed |\n| --- | --- | --- | --- | --- | --- |")
    with ReplicaSet(cache_gib=1.0) as mongod, server("appender", mongod.uri, "ours") as ours:
        wrk(ours.url, WARM, 1_000)
        half = wrk(ours.url, 64, 1_000)["rate"] / 2
        for aggregates in (1_000, 1):
            turns = Turns()
            for _ in range(TURNS):
                turns.add("ours", vegeta(ours.url, half, aggregates))
            m = turns.median
            print(
                f"| {aggregates:,} aggregate(s) | {m('ours', 'rate'):,.0f} | {m('ours', 'p50'):.1f} |"
                f" {m('ours', 'p99'):.1f} | {m('ours', 'max'):.1f} | {turns.failed('ours')} |",
                flush=True,
            )


def memory() -> None:
    """A million appends, nearly each to an aggregate of its own: the resident memory on the way."""
    print(f"\n### Memory: {MEMORY_APPENDS:,} appends over as many aggregates\n")
    print("| | appended | resident MiB |\n| --- | --- | --- |")
    for way in ("one a request", "NDJSON streams"):
        with ReplicaSet(cache_gib=1.0) as mongod, server("appender", mongod.uri, "ours") as ours:
            process = psutil.Process(ours.process.pid)
            print(f"| {way} | 0 | {process.memory_info().rss / 2**20:.0f} |")
            done, shown = 0.0, MEMORY_STEP
            while done < MEMORY_APPENDS:
                if way == "one a request":
                    found = wrk(ours.url, 64, NAMES)
                else:
                    found = apart(mongod.uri, "none", "bulk", ours.url, BULK_LINES, BULK_LINES)
                assert found["failed"] == 0
                done += found.get("requests", BULK_LINES)
                if done >= shown:
                    print(f"| | {done:,.0f} | {process.memory_info().rss / 2**20:.0f} |", flush=True)
                    shown += MEMORY_STEP


def main(names: list[str]) -> None:
    """Runs the named parts, or all."""
    parts: dict[str, Any] = {"rate": rate, "bulk": bulk, "latency": latency, "memory": memory}
    for name in names or parts:
        parts[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
