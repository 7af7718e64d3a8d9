"""`projector …` as a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import aiohttp

from eventstore.embedded import free_port
from tests.eventually import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["PROJECTOR", "ProjectorProcess", "environment"]

PROJECTOR = (sys.executable, "-c", "from projector.cli import main; main()")


def environment(mongodb_uri: str, database_name: str, **more: str) -> dict[str, str]:
    """The environment of a projector or of a command."""
    return os.environ | {"MONGODB_URI": mongodb_uri, "EVENTSTORE_DATABASE": database_name} | more


class ProjectorProcess:
    """A process, started at once; what it prints is in `output`, which is complete when it has ended."""

    def __init__(self, *arguments: str, env: dict[str, str]) -> None:
        self.port = int(env.get("PROJECTOR_HTTP_PORT", 0)) or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.output: list[str] = []
        self.process = subprocess.Popen(
            [*PROJECTOR, *arguments],
            env={"PROJECTOR_HTTP_HOST": "127.0.0.1"} | env | {"PROJECTOR_HTTP_PORT": str(self.port)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            self.output.extend(lines)

    @classmethod
    @contextlib.contextmanager
    def run(cls, *arguments: str, env: dict[str, str]) -> Iterator[ProjectorProcess]:
        """Killed at the end, if it still runs."""
        started = cls(*arguments, env=env)
        try:
            yield started
        finally:
            if started.process.poll() is None:
                started.end(signal.SIGKILL)

    def end(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal and waits for the end (at most 60 s); returns the exit code."""
        self.process.send_signal(how)
        code = self.process.wait(timeout=60)
        self._reader.join(timeout=10)
        return code

    async def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a route; (0, None) while nobody listens."""
        with contextlib.suppress(aiohttp.ClientError):
            async with aiohttp.ClientSession() as session, session.get(f"{self.url}{path}") as answer:
                return answer.status, await answer.json(content_type=None)
        return 0, None

    async def ready(self) -> None:
        """Waits until it is ready."""

        async def is_ready() -> bool:
            assert self.process.poll() is None, "".join(self.output)
            return (await self.get("/readyz"))[0] == 200

        await eventually(is_ready, "the projector is ready")
