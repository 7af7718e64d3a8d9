"""The appender as a process: it drains on SIGTERM, waits for MongoDB, and survives bad clients without leaking."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from typing import TYPE_CHECKING, Any

import aiohttp
import psutil

from eventstore import log
from eventstore.embedded import free_port
from eventstore.event import EVENTS
from tests.appending import Api, Process, event, eventually, local_appender

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from eventstore.client import Database


@contextlib.asynccontextmanager
async def ready(process: Process) -> AsyncIterator[Api]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
        api = Api(process.url, session)
        await api.ready()
        yield api


async def test_sigterm_drains_and_ends_with_0(mongodb_uri: str, database: Database) -> None:
    with Process.several(1, mongodb_uri, database.name) as (process,):
        async with ready(process) as api:
            acknowledged: list[int] = []
            refused: list[str] = []

            async def write(writer: int) -> None:
                while True:
                    try:
                        status, body = await api.append(f"a{writer}", event())
                    except aiohttp.ClientError:
                        return
                    if status == 503:
                        refused.append(body["type"])
                        return
                    assert status == 201
                    acknowledged.append(writer)

            writers = [asyncio.create_task(write(writer)) for writer in range(30)]
            await eventually(lambda: len(acknowledged) > 300)
            code, output = await asyncio.to_thread(process.stop, signal.SIGTERM)
            await asyncio.gather(*writers)
    assert code == 0, output
    assert set(refused) <= {"urn:eventprojector:problem:draining"}
    assert '"event": "appender_stopped"' in output
    assert "Traceback" not in output
    for writer in range(30):
        # What was acknowledged is there; and every request was answered, so nothing else is.
        assert await log.head(database, f"a{writer}") == acknowledged.count(writer)


async def test_a_client_that_waits_while_it_drains_gets_its_answer(mongodb_uri: str, database: Database) -> None:
    """Readiness fails first; what is queued is still written."""
    with Process.several(1, mongodb_uri, database.name) as (process,):
        async with ready(process) as api:
            blocked = await database.client.start_session().__aenter__()
            await blocked.start_transaction()
            try:
                await api.append("a", event(eventId="first"))
                # A transaction of another writer holds number 2 of the aggregate.
                await database[EVENTS].insert_one(await foreign(database, "a", 2), session=blocked)
                waiting = asyncio.create_task(api.append("a", event(eventId="second")))
                await eventually(lambda: gauge(api, "appender_queue_events", 1.0))
                assert process.process is not None
                process.process.send_signal(signal.SIGTERM)
                await eventually(lambda: unready(api))
                assert (await api.append("b", event()))[0] == 503
                assert not waiting.done()
            finally:
                await blocked.abort_transaction()
                await blocked.end_session()
            status, body = await waiting
            assert (status, body["firstSequenceNo"]) == (201, 2)
            assert await asyncio.to_thread(process.process.wait, 30) == 0
            await asyncio.to_thread(process.stop)


async def foreign(database: Database, aggregate_id: str, sequence_no: int) -> dict[str, Any]:
    (there,) = await log.history(database, aggregate_id, limit=1)
    return dict(there) | {"_id": "foreign", "sequenceNo": type(there["sequenceNo"])(sequence_no)}


async def unready(api: Api) -> bool:
    status, body = await api.call("GET", "/readyz")
    return status == 503 and "shutting down" in body["reason"]


async def gauge(api: Api, name: str, value: float) -> bool:
    text = (await api.call("GET", "/metrics"))[1]
    return f"{name} {value}" in text.splitlines()


async def test_it_waits_for_mongodb(mongodb_uri: str, database: Database) -> None:
    away = f"mongodb://127.0.0.1:{free_port()}/?replicaSet=rs0&serverSelectionTimeoutMS=300"
    with Process.several(1, away, database.name) as (process,):
        async with aiohttp.ClientSession() as session:
            api = Api(process.url, session)
            await eventually(lambda: alive(api))
            status, body = await api.call("GET", "/readyz")
            assert status == 503
            assert body["reason"]
            status, problem = await api.append("a", event())
            assert (status, problem["type"]) == (503, "urn:eventprojector:problem:unavailable")
            code, output = await asyncio.to_thread(process.stop, signal.SIGTERM)
            assert code == 0, output


async def alive(api: Api) -> bool:
    with contextlib.suppress(aiohttp.ClientError):
        return (await api.call("GET", "/healthz"))[0] == 200
    return False


async def test_without_its_unique_index_nothing_is_appended(mongodb_uri: str, database: Database) -> None:
    await database[EVENTS].drop_index("aggregate_sequence")
    with Process.several(1, mongodb_uri, database.name, EVENTSTORE_PROVISION="false") as (process,):
        async with aiohttp.ClientSession() as session:
            api = Api(process.url, session)
            await eventually(lambda: alive(api))
            await eventually(lambda: misses_its_index(api))
            assert (await api.append("a", event()))[0] == 503
            assert await database[EVENTS].count_documents({}) == 0
            await database[EVENTS].create_index(
                [("aggregateId", 1), ("sequenceNo", 1)], name="aggregate_sequence", unique=True
            )
            await api.ready()
            assert (await api.append("a", event()))[0] == 201


async def misses_its_index(api: Api) -> bool:
    return "aggregate_sequence" in str((await api.call("GET", "/readyz"))[1])


async def test_bad_clients_leave_nothing_behind(mongodb_uri: str, database: Database) -> None:
    """Silent, slow, huge and vanishing clients: each is cut off, and connections, tasks and queue are as before."""
    async with local_appender(mongodb_uri, database.name, read_timeout_seconds=0.5) as api:
        host, port = api.url.removeprefix("http://").split(":")
        await api.append("a", event(payload={"x": "x" * 200_000}))
        for _ in range(300):
            await api.append("long", event(payload={"x": "x" * 50_000}))
        assert api.metrics is not None
        registry = api.metrics.registry
        tasks_before = len(asyncio.all_tasks())
        connections_before = registry.get_sample_value("appender_http_connections")

        async def send(data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(data)
            await writer.drain()
            return reader, writer

        async def answer(data: bytes) -> bytes:
            """The status line; the server must end the connection by itself."""
            reader, writer = await send(data)
            async with asyncio.timeout(15):
                received = await reader.read()
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            return received.split(b"\r\n", 1)[0]

        post = b"POST /v1/aggregates/a/events HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        bulk = b"POST /v1/events HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
        # A body that stops, a huge header, too many headers, nonsense.
        results = await asyncio.gather(
            *(answer(post + b'Content-Length: 100\r\n\r\n{"events":[') for _ in range(20)),
            *(answer(post + b"X-Long: " + b"x" * 100_000 + b"\r\n\r\n") for _ in range(5)),
            *(answer(post + b"".join(b"X-%d: 1\r\n" % n for n in range(5_000)) + b"\r\n") for _ in range(5)),
            *(answer(b"\x16\x03\x01 nonsense\r\n\r\n") for _ in range(5)),
            *(answer(bulk + b'5\r\n{"agg\r\n') for _ in range(10)),
        )
        codes = [result[9:12] for result in results]
        assert set(codes[:20]) == {b"408"}
        assert set(codes[20:35]) == {b"400"}

        # They hang up: in the head, in the body, while the answer comes, in the middle of a stream.
        line = b'{"aggregateId":"b","eventName":"x","payload":{}}\n'
        partial = [
            b"POST /v1/aggr",
            post + b'Content-Length: 100\r\n\r\n{"events":[',
            b"GET /v1/aggregates/long/events HTTP/1.1\r\nHost: x\r\nAccept: application/x-ndjson\r\n\r\n",
            bulk + b"%x\r\n%s\r\n" % (len(line) * 100, line * 100),
        ]
        for round_no in range(40):
            _, writer = await send(partial[round_no % len(partial)])
            sock: socket.socket = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            writer.close()  # with a reset

        # They ask and do not take the answer.
        stuck = [
            await send(b"GET /v1/aggregates/long/events HTTP/1.1\r\nHost: x\r\nAccept: application/x-ndjson\r\n\r\n")
            for _ in range(5)
        ]
        await eventually(
            lambda: registry.get_sample_value("appender_http_connections") == connections_before, seconds=30
        )
        for _, writer in stuck:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        await eventually(lambda: len(asyncio.all_tasks()) <= tasks_before)
        assert registry.get_sample_value("appender_queue_events") == 0
        assert registry.get_sample_value("appender_http_requests_in_progress") == 0
        assert (await api.append("a", event()))[0] == 201


async def test_memory_does_not_grow_with_clients_that_vanish(mongodb_uri: str, database: Database) -> None:
    with Process.several(1, mongodb_uri, database.name) as (process,):
        async with ready(process):
            assert process.process is not None
            memory = psutil.Process(process.process.pid)

            async def vanish(count: int) -> None:
                body = b'{"events":[{"eventName":"x","payload":{"x":"' + b"x" * 100_000 + b'"}}]}'
                head = b"POST /v1/aggregates/v/events HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                for _ in range(count):
                    _, writer = await asyncio.open_connection("127.0.0.1", process.port)
                    writer.write(head + b"Content-Length: %d\r\n\r\n" % (len(body) + 1) + body)
                    writer.close()

            await vanish(300)
            before = memory.memory_info().rss
            await vanish(3_000)  # 300 MB that must not stay
            await eventually(lambda: memory.num_fds() < 60)
            assert memory.memory_info().rss - before < 50e6
