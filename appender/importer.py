"""`appender import`: posts a file of events to an appender, each aggregate's in order, and again without doubling any.

A file is NDJSON (one event a line, as the bulk route takes it) or CSV (a header, then one event a row). An event without an
eventId gets one that derives from its place and content in the file, so that a second run, or one after a crash, appends
only what is missing. Aggregates are shared among the clients by their hash: one client has all events of an aggregate.
"""

from __future__ import annotations

import asyncio
import csv
import datetime
import itertools
import json
import time
import uuid
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import aiohttp
import msgspec
import stamina

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

__all__ = ["DETECT", "BadFileError", "Columns", "Imported", "Row", "count_rows", "import_file", "read_rows"]

CHUNK_EVENTS: Final = 100
"""Events per request: the rate is flat from here on, and a chunk that fails is repeated event by event."""

CHUNK_BYTES: Final = 2 * 1024 * 1024

QUEUE_EVENTS: Final = 4 * CHUNK_EVENTS
"""Rows read ahead for each client."""

PATIENCE_SECONDS: Final = 120.0
"""How long a request is repeated while the appender is away, full or unsure: longer than an election and a restart."""

KEPT_ERRORS: Final = 20

_NAMESPACE: Final = uuid.UUID("6f1dcbcb-3a0c-5d5d-9a5e-5f0c1a6d2a77")
"""Of the derived eventIds. It can never change, or a second run would append everything again."""

_DETECTED: Final = {
    "aggregate_id": ("aggregateId", "case:concept:name"),
    "event_name": ("eventName", "concept:name"),
    "timestamp": ("timestamp", "time:timestamp"),
    "event_id": ("eventId",),
}
"""Column names that are recognised: the API's own, and those of event logs in XES."""

_LINE_FIELDS: Final = frozenset({"aggregateId", "eventId", "eventName", "timestamp", "payload", "metadata"})


class BadFileError(ValueError):
    """The file cannot be read as events; the message names the line."""


class Columns(NamedTuple):
    """Which columns of a CSV file hold what; None: found by name."""

    aggregate_id: str | None = None
    event_name: str | None = None
    timestamp: str | None = None
    event_id: str | None = None


DETECT: Final = Columns()
"""All columns are found by their names."""


class Row(NamedTuple):
    """An event of the file."""

    line: int
    aggregate_id: str
    event: dict[str, Any]


@dataclass
class Imported:
    """What an import did."""

    appended: int = 0
    already_there: int = 0
    failed: int = 0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)
    """The first errors, with their lines."""


def read_rows(path: Path, columns: Columns = DETECT, order: Literal["file", "timestamp"] = "file") -> Iterable[Row]:
    """The events of a file: as they stand in it (read as they are asked for), or sorted by timestamp (all in memory);
    those of the same time stay as they stand. A timestamp without offset is UTC. Empty cells of a CSV are left out of
    the payload. Raises BadFileError and OSError.
    """
    rows = _read_csv(path, columns) if path.suffix.lower() == ".csv" else _read_ndjson(path)
    if order == "timestamp":
        return sorted(rows, key=_when)
    return rows


def _when(row: Row) -> datetime.datetime:
    text = row.event.get("timestamp")
    if text is None:
        raise BadFileError(f"line {row.line}: an event without timestamp cannot be sorted by it")
    return _parse_time(text, row.line)


def _parse_time(text: str, line: int) -> datetime.datetime:
    try:
        when = datetime.datetime.fromisoformat(text)
    except (TypeError, ValueError) as error:
        raise BadFileError(f"line {line}: {text!r} is no ISO 8601 timestamp") from error
    return when if when.tzinfo is not None else when.replace(tzinfo=datetime.UTC)


def _derived_id(line: int, content: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, f"{line}:{content}"))


def _read_ndjson(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, 1):
            stripped = text.strip()
            if not stripped:
                continue
            try:
                event = msgspec.json.decode(stripped, type=dict[str, Any])
                aggregate_id = event.pop("aggregateId")
            except (msgspec.DecodeError, KeyError) as error:
                raise BadFileError(f"line {line}: {error or 'no event'}") from error
            if unknown := event.keys() - _LINE_FIELDS:
                raise BadFileError(f"line {line}: unknown field {min(unknown)}")
            event.setdefault("eventId", _derived_id(line, stripped))
            yield Row(line, str(aggregate_id), event)


def _read_csv(path: Path, columns: Columns) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        names = reader.fieldnames or []
        found = Columns(*(_column(names, role, given) for role, given in columns._asdict().items()))
        own = [name for name in names if name not in found]
        if bad := [name for name in own if name.startswith("$") or "." in name]:
            raise BadFileError(f"line 1: the column {bad[0]!r} is no valid field name (no $ in front, no dot)")
        try:
            for cells in reader:
                yield _csv_row(reader.line_num, cells, found, own)
        except csv.Error as error:
            raise BadFileError(f"line {reader.line_num}: {error}") from error


def _csv_row(line: int, cells: dict[str, str], found: Columns, own: Sequence[str]) -> Row:
    if None in cells or None in cells.values():
        raise BadFileError(f"line {line}: it has another number of cells than the header")
    event: dict[str, Any] = {
        "eventName": cells[str(found.event_name)],
        "payload": {name: cells[name] for name in own if cells[name]},
        "eventId": (found.event_id and cells[found.event_id]) or _derived_id(line, json.dumps(list(cells.values()))),
    }
    if found.timestamp and cells[found.timestamp]:
        event["timestamp"] = _parse_time(cells[found.timestamp], line).isoformat()
    return Row(line, cells[str(found.aggregate_id)], event)


def _column(names: Sequence[str], role: str, given: str | None) -> str | None:
    candidates = (given,) if given is not None else _DETECTED[role]
    for name in candidates:
        if name in names:
            return name
    if given is None and role in {"timestamp", "event_id"}:
        return None
    option = "--" + role.replace("_", "-")
    raise BadFileError(f"line 1: name the column with {option}; the file has {', '.join(names) or 'no columns'}")


async def import_file(
    path: Path,
    url: str,
    *,
    columns: Columns = DETECT,
    order: Literal["file", "timestamp"] = "file",
    clients: int = 16,
    token: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Imported:
    """Posts the events of a file to the appender at `url`; `progress` is told how many more are done.

    Raises BadFileError and OSError for the file, and `aiohttp.ClientError` when the appender stays away for two minutes.
    What was appended until then stays; the next run goes on.
    """
    started = time.monotonic()
    result = Imported()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connector = aiohttp.TCPConnector(limit=clients)
    timeout = aiohttp.ClientTimeout(total=60)
    queues: list[asyncio.Queue[Row | None]] = [asyncio.Queue(QUEUE_EVENTS) for _ in range(clients)]
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout, headers=headers) as session:
        try:
            async with asyncio.TaskGroup() as group:
                for queue in queues:
                    group.create_task(_Client(session, result, progress).run(queue))
                for row in read_rows(path, columns, order):
                    await queues[zlib.crc32(row.aggregate_id.encode(errors="replace")) % clients].put(row)
                for queue in queues:
                    await queue.put(None)
        except* (BadFileError, OSError, aiohttp.ClientError) as errors:
            raise _first(errors) from None
    result.seconds = time.monotonic() - started
    return result


def _first(errors: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class _Client:
    """One of the clients: takes its rows in order, some at once."""

    def __init__(
        self, session: aiohttp.ClientSession, result: Imported, progress: Callable[[int], None] | None
    ) -> None:
        self._session = session
        self._result = result
        self._progress = progress

    async def run(self, queue: asyncio.Queue[Row | None]) -> None:
        """Posts rows until None comes."""
        more = True
        while more:
            rows: list[Row] = []
            size = 0
            while len(rows) < CHUNK_EVENTS and size < CHUNK_BYTES and (not rows or not queue.empty()):
                row = await queue.get()
                if row is None:
                    more = False
                    break
                rows.append(row)
                size += len(msgspec.json.encode(row.event))
            if rows:
                await self._post(rows)

    async def _post(self, rows: list[Row]) -> None:
        """Posts rows in one atomic request; one by one when that is refused, to tell which of them it was."""
        status, problem = await self._send(rows)
        if status in {200, 201}:
            if status == 201:
                self._result.appended += len(rows)
            else:
                self._result.already_there += len(rows)
            if self._progress is not None:
                self._progress(len(rows))
        elif len(rows) > 1:
            for row in rows:
                await self._post([row])
        else:
            self._result.failed += 1
            if len(self._result.errors) < KEPT_ERRORS:
                self._result.errors.append(f"line {rows[0].line}: {status} {problem}")
            if self._progress is not None:
                self._progress(1)

    async def _send(self, rows: list[Row]) -> tuple[int, str]:
        together: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            together.setdefault(row.aggregate_id, []).append(row.event)
        body = msgspec.json.encode(
            {"appends": [{"aggregateId": aggregate_id, "events": events} for aggregate_id, events in together.items()]}
        )
        async for attempt in stamina.retry_context(
            on=(aiohttp.ClientError, TimeoutError), attempts=None, timeout=PATIENCE_SECONDS, wait_max=2.0
        ):
            with attempt:
                async with self._session.post(
                    "/v1/events", data=body, headers={"Content-Type": "application/json"}
                ) as response:
                    if response.status >= 500:
                        response.raise_for_status()  # repeated: the eventIds make that safe
                    text = await response.text()
                    return response.status, text if response.status >= 400 else ""
        raise AssertionError("unreachable")  # retry_context raises the last error


def count_rows(path: Path) -> int:
    """How many lines a file has, for a progress bar: quick, and about right."""
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in itertools.takewhile(bool, iter(lambda: file.read(1 << 20), b"")))
