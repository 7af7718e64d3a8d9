"""A real Prometheus and the processes that it scrapes, for the test of dashboards and alerts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
import yaml

from deploy.observability.catalogue import RULES
from eventstore.embedded import free_port
from tests.conftest import missing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

__all__ = ["Process", "Prometheus", "Series", "eventually", "prometheus"]

SCRAPE_SECONDS = 1


async def eventually(question: Callable[[], Any], what: str, seconds: float = 90) -> Any:
    """The first true answer to an async question."""
    deadline = time.monotonic() + seconds
    while True:
        if found := await question():
            return found
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s: {what}")
        await asyncio.sleep(0.2)


@dataclass
class Process:
    """One of our processes, a target of Prometheus under a namespace of its own choice."""

    name: str
    namespace: str
    command: list[str]
    environment: dict[str, str]
    folder: Path
    port: int = field(default_factory=free_port)
    """Of `/metrics`."""
    running: subprocess.Popen[bytes] | None = None

    @property
    def instance(self) -> str:
        """As Prometheus knows it."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts it, in an environment of nothing but what it needs."""
        program = Path(sys.executable).with_name(self.command[0])
        environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **self.environment}
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.running = subprocess.Popen(
                [program, *self.command[1:]], env=environment, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT
            )

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Ends it, and waits for that."""
        running, self.running = self.running, None
        if running is not None:
            running.send_signal(how)
            try:
                running.wait(60)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait(10)
                pytest.fail(f"{self.name} has not ended within 60 s of {how.name}; its last lines:\n{self.log}")

    @property
    def log(self) -> str:
        """The last lines that it wrote."""
        return "\n".join((self.folder / f"{self.name}.log").read_text().splitlines()[-20:])


@dataclass
class Series:
    """A series of a range query."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


class Prometheus:
    """Asks a Prometheus server."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url
        self._session = session
        self.started = time.time()

    async def _call(self, path: str, **parameters: Any) -> Any:
        data = {key: str(value) for key, value in parameters.items()}
        async with self._session.post(f"{self.url}/api/v1/{path}", data=data) as response:
            answer = await response.json()
            assert answer["status"] == "success", answer
            return answer["data"]

    async def now(self, expression: str, at: float | None = None) -> list[Any]:
        """What an expression finds at a moment."""
        found: list[Any] = (await self._call("query", query=expression, **({"time": at} if at else {})))["result"]
        return found

    async def course(self, expression: str, start: float, end: float, step: float = 1) -> list[Series]:
        """What an expression finds over time."""
        found = await self._call("query_range", query=expression, start=start, end=end, step=step)
        return [
            Series(series["metric"], [(float(at), float(value)) for at, value in series["values"]])
            for series in found["result"]
        ]

    async def seen(self, expression: str, what: str = "", seconds: float = 90) -> None:
        """Waits until an expression finds something."""
        await eventually(lambda: self.now(expression), what or expression, seconds)

    async def alerts(self) -> set[str]:
        """Names of the alerts that fire or are about to."""
        found = await self._call("alerts")
        return {alert["labels"]["alertname"] for alert in found["alerts"]}


@contextlib.asynccontextmanager
async def prometheus(folder: Path, targets: list[Process], later_seconds: int) -> AsyncIterator[Prometheus]:
    """A server with the shipped rules that scrapes the targets every second.

    Queries may be asked as of `later_seconds` from now: samples are looked back for as long.
    """
    program = shutil.which("prometheus")
    if program is None:
        missing("no prometheus: apt-get install prometheus")
    port = free_port()
    (folder / "prometheus.yml").write_text(
        yaml.safe_dump(
            {
                "global": {
                    "scrape_interval": f"{SCRAPE_SECONDS}s",
                    "scrape_timeout": "1s",
                    "evaluation_interval": "1s",
                },
                "rule_files": [str(RULES / "*.yaml")],
                "scrape_configs": [
                    {
                        "job_name": "eventprojector",
                        "honor_labels": True,  # as the PodMonitor has it: conditions keep the namespace of their resource
                        "static_configs": [
                            {"targets": [each.instance], "labels": {"namespace": each.namespace, "pod": each.name}}
                            for each in targets
                        ],
                    }
                ],
            }
        )
    )
    command = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    command += [f"--web.listen-address=127.0.0.1:{port}", f"--query.lookback-delta={later_seconds}s"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        async with aiohttp.ClientSession() as session:
            server = Prometheus(f"http://127.0.0.1:{port}", session)

            async def ready() -> bool:
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{server.url}/-/ready") as response:
                        return response.status == 200
                return False

            await eventually(ready, "Prometheus is ready", 30)
            yield server
    finally:
        process.terminate()
        process.wait(30)
