"""What a failure amid a write leaves behind, and that nobody goes on from a position that is ahead of the read model."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from pydantic import SecretStr
from pymongo.errors import AutoReconnect, ConnectionFailure

from eventstore.client import Database, connect, open_database
from projector import loop as loop_module
from projector.changes import StaleMarksError
from projector.checkpoint import Checkpoint, ensure_layout
from tests.eventually import eventually_equal
from tests.projecting import (
    Here,
    Writer,
    all_events,
    begun,
    documents,
    event,
    expected_ledgers,
    expected_rooms,
    ledger,
    only,
    rooms,
)


def announced(monkeypatch: pytest.MonkeyPatch, method: str) -> asyncio.Event:
    """Set when a method of the loop is called."""
    called = asyncio.Event()
    real = getattr(loop_module.Loop, method)

    async def announcing(self: Any, *rest: Any) -> None:
        called.set()
        await real(self, *rest)

    monkeypatch.setattr(loop_module.Loop, method, announcing)
    return called


async def test_a_shutdown_does_not_pass_what_a_write_under_way_then_loses(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write fails after the partition was asked to stop: its events must not be passed by the last checkpoint."""
    build = await begun(database, ledger())
    writer, here = Writer(database), Here(database)
    under_way, draining = asyncio.Event(), announced(monkeypatch, "_drain")

    async def fails(*_: Any) -> None:
        under_way.set()
        await draining.wait()
        raise AutoReconnect("the connection was lost")

    async with here.runs(build, only(build)) as partition:
        monkeypatch.setattr(loop_module.Loop, "_transaction", fails)
        await writer.append("a")
        await under_way.wait()
        partition.stop()
    monkeypatch.undo()
    async with Here(database).runs(build, only(build)):
        await writer.append("b")
        await eventually_equal(
            lambda: documents(database, build.collection), expected_ledgers(await all_events(database))
        )


async def test_an_idle_checkpoint_does_not_pass_what_a_failed_write_lost(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader waits for the writer to move an idle checkpoint, and the writer fails."""
    build = await begun(database, ledger())
    writer, here = Writer(database), Here(database)
    async with here.runs(build, only(build)):
        monkeypatch.setattr(loop_module, "IDLE_CHECKPOINT_SECONDS", 0.0)
        moving = announced(monkeypatch, "_move_checkpoint")
        real = loop_module.Loop._transaction
        failed = False

        async def fails_once(self: Any, *rest: Any) -> None:
            nonlocal failed
            if not failed:
                failed = True
                moving.clear()
                await moving.wait()
                raise ConnectionFailure("the connection was lost")
            await real(self, *rest)

        monkeypatch.setattr(loop_module.Loop, "_transaction", fails_once)
        await writer.append("a")
        await eventually_equal(
            lambda: documents(database, build.collection), expected_ledgers(await all_events(database))
        )
        assert failed


async def test_the_next_owner_need_not_wait_for_what_a_killed_one_left_open(
    mongodb_uri: str, database: Database
) -> None:
    """A transaction that nobody will end holds the checkpoint for a minute, unless somebody ends it."""
    build = await begun(database, ledger())

    async def killed(owner: str) -> int:
        """Leaves a transaction open; returns the epoch of its owner."""
        async with connect(SecretStr(mongodb_uri), "projector") as doomed:
            left = await Checkpoint.take(open_database(doomed, database.name), only(build), owner)
            await left.session.start_transaction()
            await left.move(left.position, left.session)
            return left.epoch

    epoch = await killed("killed")
    async with asyncio.timeout(20):
        taken = await Checkpoint.take(database, only(build), "next")
    assert taken.epoch == epoch + 1
    await taken.close()

    await killed("killed again")
    async with asyncio.timeout(20):
        assert await ensure_layout(database, build.id, 2)


async def test_stale_marks_apply_nothing_twice(database: Database) -> None:
    """Marks that a primary just elected answered from the past: documents read in the transaction are newer."""
    build = await begun(database, rooms())
    writer, here = Writer(database), Here(database)
    async with here.runs(build, only(build)):
        await writer.append("a", "counted", "counted", rooms=["x"])
        await eventually_equal(
            lambda: documents(database, build.collection), expected_rooms(await all_events(database))
        )
    from projector.shared import SharedFolder

    folder = SharedFolder(database, build)
    await folder.load({"a", "b"})
    await database[build.marks].update_one({"_id": "a"}, {"$set": {"mark": 1}})
    stale = SharedFolder(database, build)
    await stale.load({"a", "b"})
    await database[build.marks].update_one({"_id": "a"}, {"$set": {"mark": 2}})
    events = [dict(each) for each in await all_events(database)]
    stale.fold([e for e in events if e["sequenceNo"] == 2], ())
    before = await documents(database, build.collection)
    async with database.client.start_session() as session:
        with pytest.raises(StaleMarksError):
            await session.with_transaction(stale.take()[0].write)
        stale.fold([event("b", 1, rooms=["x"])], ())  # a mark that was not there, and now is
        await database[build.marks].insert_one({"_id": "b", "mark": 1})
        with pytest.raises(StaleMarksError):
            await session.with_transaction(stale.take()[0].write)
    assert await documents(database, build.collection) == before
