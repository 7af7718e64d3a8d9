"""Processes that scan ranges of a build side by side, since folding in Python keeps one processor busy.

    parent (the partition that has the scan)                 worker: python -m projector.workers
    Workers.run ──── job: one BSON document, on stdin ────>  connects, claims ranges, scans them (projector.scan)
                <─── its last words: one JSON line, stdout ─ ends when no range is left

All progress goes through MongoDB. A worker ends when its stdin does, thus also when its parent was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

import bson
import msgspec
import uvloop
from pydantic import SecretStr
from pymongo.errors import AutoReconnect

from eventstore import tasks
from eventstore.client import connect, open_database
from eventstore.errors import Meaning, classify
from projector import collector
from projector.aside import StoppedError
from projector.build import Build
from projector.checkpoint import FencedError
from projector.declared import from_definition
from projector.errors import ProjectionError
from projector.loader import load_modules
from projector.scan import Pace, Scanner

if TYPE_CHECKING:
    from eventstore.client import Database
    from projector.projection import Projection

__all__ = ["Job", "WorkerError", "run", "scan_here", "travels"]

STOP_SECONDS: Final = 5.0
"""How long a worker may take to end its transaction; killed amid one, it would hold its documents locked for up to a minute."""

_LAST_WORDS: Final = 4_000


class WorkerError(Exception):
    """A worker ended without having done its work; the text is its last words."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to know."""

    uri: str
    log: str
    database: str
    number: int
    owner: str
    events_per_second: float
    retry_seconds: float
    max_parked: int
    name: str
    definition: dict[str, Any] | None = None
    module: str | None = None
    path: list[str] = msgspec.field(default_factory=lambda: list(sys.path))
    """Where the module is found."""

    def projection(self) -> Projection:
        """Makes the projection anew. Raises ProjectionError."""
        if self.definition is not None:
            return from_definition(self.definition)
        sys.path[:] = self.path
        for projection in load_modules([self.module] if self.module else []):
            if projection.name == self.name:
                return projection
        raise ProjectionError(f"module {self.module}: there is no projection {self.name!r} in it")


class _LastWords(msgspec.Struct):
    """How a worker ended."""

    kind: str
    text: str = ""


def travels(projection: Projection) -> bool:
    """Whether another process can make this projection anew."""
    return projection.definition is not None or projection.module is not None


async def scan_here(log: Database, database: Database, build: Build, job: Job) -> None:
    """Scans in this process: a short log, or a projection that no other process can make."""
    await _scanner(log, database, build, job).run(job.owner)


def _scanner(log: Database, database: Database, build: Build, job: Job) -> Scanner:
    pace = Pace(job.events_per_second)
    return Scanner(log, database, build, pace=pace, retry_seconds=job.retry_seconds, max_parked=job.max_parked)


async def run(job: Job, count: int) -> None:
    """Runs `count` workers until all ranges are done; none of them outlives this.

    Raises FencedError, StoppedError, AutoReconnect when MongoDB was away, or WorkerError when one ended in another way; the
    other ones are then ended too.
    """
    share = msgspec.structs.replace(job, events_per_second=job.events_per_second / count)
    message = bson.encode(msgspec.to_builtins(share))
    working = [asyncio.create_task(_work(message)) for _ in range(count)]
    try:
        await asyncio.gather(*working)
    finally:
        await tasks.end(working)


async def _work(message: bytes) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "projector.workers",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None  # noqa: S101 - a pipe
    try:
        process.stdin.write(message)
        output, errors = await _communicate(process)
    finally:
        with contextlib.suppress(TimeoutError):
            await _end(process)
    _judge(process.returncode, output, errors)


async def _communicate(process: asyncio.subprocess.Process) -> tuple[bytes, bytes]:
    """Both outputs to their ends; stdin stays open, for its end would end the worker."""
    assert process.stdout is not None  # noqa: S101 - pipes
    assert process.stderr is not None  # noqa: S101
    return await asyncio.gather(_tail(process.stdout), _tail(process.stderr))


async def _tail(stream: asyncio.StreamReader) -> bytes:
    kept = b""
    while chunk := await stream.read(65_536):
        kept = (kept + chunk)[-_LAST_WORDS:]
    return kept


async def _end(process: asyncio.subprocess.Process) -> None:
    """Lets it end its transaction, then kills it."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await process.wait()
    except (TimeoutError, asyncio.CancelledError):
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise


def _judge(code: int | None, output: bytes, errors: bytes) -> None:
    try:
        words = msgspec.json.decode(output, type=_LastWords)
    except msgspec.DecodeError:
        words = _LastWords("unexpected", f"it ended with {code}: {errors.decode(errors='replace')}")
    match words.kind:
        case "done":
            return
        case "fenced":
            raise FencedError(words.text)
        case "stopped":
            raise StoppedError(words.text)
        case "unavailable":
            raise AutoReconnect(words.text)
    raise WorkerError(words.text)


# The worker's side


def main() -> None:
    """A worker's whole life."""
    job = msgspec.convert(next(iter(bson.decode_file_iter(sys.stdin.buffer))), Job, strict=False)
    collector.relax()
    words = uvloop.run(_main(job))
    sys.stdout.buffer.write(msgspec.json.encode(words))
    sys.stdout.flush()


async def _main(job: Job) -> _LastWords:
    loop = asyncio.get_running_loop()
    scan = asyncio.create_task(_scan(job))
    threading.Thread(target=_watch_parent, args=(loop, scan), daemon=True).start()
    try:
        await scan
    except asyncio.CancelledError:
        return _LastWords("cancelled")
    except FencedError as error:
        return _LastWords("fenced", str(error))
    except StoppedError as error:
        return _LastWords("stopped", str(error))
    except Exception as error:  # noqa: BLE001 - the parent tells it
        kind = "unexpected" if classify(error) is Meaning.UNEXPECTED else "unavailable"
        return _LastWords(kind, f"{type(error).__name__}: {error}"[:_LAST_WORDS])
    return _LastWords("done")


def _watch_parent(loop: asyncio.AbstractEventLoop, scan: asyncio.Task[None]) -> None:
    """Ends the worker when its stdin does: at once, or at the latest in a while when its loop is stuck in a handler."""
    # Past Python's own buffer, whose lock a thread that is still reading keeps: the interpreter would wait a second for it to end.
    while os.read(sys.stdin.fileno(), 1):
        pass
    with contextlib.suppress(RuntimeError):  # the loop has ended already
        loop.call_soon_threadsafe(scan.cancel)
    timer = threading.Timer(STOP_SECONDS, os._exit, args=(1,))
    timer.daemon = True
    timer.start()
    timer.join()


async def _scan(job: Job) -> None:
    build = Build(job.projection(), job.number)
    async with connect(SecretStr(job.uri), "projector") as client:
        await scan_here(open_database(client, job.log), open_database(client, job.database), build, job)


if __name__ == "__main__":
    main()
