"""The verbs against a running projector on a real MongoDB."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from eventstore.event import EVENTS
from projector import builds
from projector.ops import Ops
from projector.refusals import Conflict, Invalid, NotFound
from projector.status import REPORTS
from tests.eventually import eventually
from tests.projecting import Faults, Writer, documents, ledger, rooms, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from eventstore.client import Database
    from projector.projection import Projection


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def projections(faults: Faults) -> list[Projection]:
    return [ledger(faults), rooms()]


@pytest.fixture
def ops(database: Database, projections: list[Projection]) -> Ops:
    found = Ops(database, database, lambda: {projection.name: projection for projection in projections})
    found.grace_seconds = 1.5
    return found


@pytest.fixture
async def live(database: Database, projections: list[Projection], ops: Ops) -> AsyncIterator[Writer]:
    """A projector at work, with both projections cut over; yields a writer."""
    writer = Writer(database)
    async with running(database, projections, lease_seconds=0.5, retry_seconds=0.0):
        await _all_live(ops, writer)
        yield writer


async def _all_live(ops: Ops, writer: Writer | None = None) -> None:
    async def every() -> bool:
        if writer is not None:  # what a quiet stream has to say comes once a second
            await writer.append("warm", "noise")
        found = await ops.projections()
        return bool(found) and all(each.state == "live" and each.live for each in found)

    await eventually(every)


async def _live_build(ops: Ops, name: str, build: str, writer: Writer | None = None) -> None:
    async def there() -> bool:
        if writer is not None:
            await writer.append("warm", "noise")
        return (await ops.show(name)).live == build

    await eventually(there, f"{build} live")


async def test_list_show_and_unknown_names(ops: Ops, live: Writer) -> None:
    await live.append("a")
    await ops.wait("ledger", "a", 1)
    found = {each.name: each for each in await ops.projections()}
    assert list(found) == ["ledger", "rooms"]
    assert found["ledger"].version == 1
    detail = await ops.show("ledger")
    assert detail.lag_seconds is not None
    assert [(build.id, build.role, build.documents) for build in detail.builds] == [("ledger.v1", "live", 1)]
    (partition,) = detail.partition_owners
    assert partition.owner
    assert partition.state == "live"
    for verb in (
        ops.show("permits"), ops.pause("permits"), ops.resume("permits"), ops.rebuild("permits"), ops.drop("permits"),
        ops.cutover("permits"), ops.rollback("permits"), ops.cancel("permits"), ops.parked("permits"),
        ops.retry("permits"), ops.skip("permits", "a", 1), ops.wait("permits", "a", 1), ops.verify("permits"),
        ops.partitions("permits", 2),
    ):  # fmt: skip
        with pytest.raises(NotFound, match="'permits'; there is ledger, rooms"):
            await verb


async def test_pause_holds_and_resume_lets_go(ops: Ops, live: Writer, database: Database) -> None:
    assert (await ops.pause("ledger")).state == "paused"

    async def stopped() -> bool:
        return await database["projector.leases"].count_documents({"_id": {"$regex": "^ledger"}}) == 0

    await eventually(stopped)
    await live.append("a")
    await ops.wait("rooms", "a", 1)
    assert not (await ops.wait("ledger", "a", 1, timeout=0)).reached
    assert (await ops.resume("ledger")).state != "paused"
    assert (await ops.wait("ledger", "a", 1)).reached
    # It also clears a failure.
    await builds.set_control(database, "ledger", failed="too many aggregates are set aside")
    assert (await ops.show("ledger")).state == "failed"
    await live.append("a")
    await ops.resume("ledger")
    assert (await ops.wait("ledger", "a", 2)).reached


async def test_partitions(ops: Ops, live: Writer, database: Database) -> None:
    for count in (0, 65):
        with pytest.raises(Invalid, match="must be 1 to 64"):
            await ops.partitions("ledger", count)
    await ops.partitions("ledger", 4)

    async def four_run() -> bool:
        owners = (await ops.show("ledger")).partition_owners
        return len(owners) == 4 and all(each.state == "live" for each in owners)

    await eventually(four_run)
    for number in range(20):
        await live.append(f"a{number}")
    for number in range(20):
        assert (await ops.wait("ledger", f"a{number}", 1)).reached
    assert len(await documents(database, "ledger")) == 20


# Builds


async def test_rebuild_rollback_and_what_is_kept(ops: Ops, live: Writer, database: Database) -> None:
    await live.append("a")
    await ops.wait("ledger", "a", 1)
    assert await ops.rebuild("ledger") == "ledger.v1-2"
    await _live_build(ops, "ledger", "ledger.v1-2", live)
    await live.append("a")
    await ops.wait("ledger", "a", 2)
    # The first build stands at 1 now. Back to it: not before it has caught up.
    assert await ops.rollback("ledger") == "ledger.v1"
    await _live_build(ops, "ledger", "ledger.v1", live)
    assert (await documents(database, "ledger"))["a"]["applied"] == [1, 2]
    assert (await ops.show("ledger")).previous == "ledger.v1-2"
    # And forward again, by the same verb.
    await ops.rollback("ledger")
    await _live_build(ops, "ledger", "ledger.v1-2", live)
    # Two builds later the first is gone, with all that belonged to it.
    await ops.rebuild("ledger")
    await _live_build(ops, "ledger", "ledger.v1-3", live)

    async def first_is_gone() -> bool:
        return [build.id for build in (await ops.show("ledger")).builds] == ["ledger.v1-2", "ledger.v1-3"]

    await eventually(first_is_gone)
    names = await database.list_collection_names()
    assert "ledger.v1" not in names
    assert "ledger.v1.marks" not in names
    assert await database[REPORTS].count_documents({"_id": {"$regex": "^ledger.v1/"}}) == 0


async def test_a_build_waits_for_a_cutover_by_hand_or_is_cancelled(ops: Ops, live: Writer, database: Database) -> None:
    await live.append("a")
    with pytest.raises(Conflict, match="no build that could take over"):
        await ops.cutover("ledger")
    with pytest.raises(Conflict, match="nothing of ledger is being built"):
        await ops.cancel("ledger")
    await builds.set_control(database, "ledger", manualCutover=True)
    candidate = await ops.rebuild("ledger")
    assert await ops.cancel("ledger") == candidate
    await live.append("a")
    assert (await ops.wait("ledger", "a", 2)).build == "ledger.v1"

    async def gone() -> bool:
        return candidate not in await database.list_collection_names()

    await eventually(gone)
    assert (await ops.show("ledger")).candidate is None
    candidate = await ops.rebuild("ledger")
    with pytest.raises(Conflict, match="is being built already"):
        await ops.rebuild("ledger")
    with pytest.raises(Conflict, match="no previous build"):
        await ops.rollback("ledger")

    async def ready() -> bool:
        owners = (await ops.show("ledger")).partition_owners
        return any(each.build == candidate and each.state == "live" for each in owners)

    await eventually(ready)
    assert (await ops.show("ledger")).live == "ledger.v1"
    assert await ops.cutover("ledger") == candidate
    await _live_build(ops, "ledger", candidate, live)


@pytest.mark.usefixtures("live")
async def test_the_build_of_a_new_version_is_not_cancelled(ops: Ops, database: Database) -> None:
    await builds.ensure_build(database, database, ledger(version=2), 1)
    with pytest.raises(Conflict, match="because version 2 is defined"):
        await ops.cancel("ledger")


async def test_a_rollback_that_nobody_could_carry_out_is_refused(
    database: Database, ops: Ops, projections: list[Projection]
) -> None:
    writer = Writer(database)
    async with running(database, projections, lease_seconds=0.5):
        await _all_live(ops, writer)
    newer = [ledger(version=2), projections[1]]
    async with running(database, newer, lease_seconds=0.5):
        await _live_build(ops, "ledger", "ledger.v2", writer)
        with pytest.raises(Conflict, match="no projector that runs now has version 1 of its code"):
            await ops.rollback("ledger")
        assert (await ops.show("ledger")).candidate is None
    # The old code is deployed again: now it can be.
    async with running(database, projections, lease_seconds=0.5):

        async def rolled_back() -> bool:
            with contextlib.suppress(Conflict):
                await ops.rollback("ledger")
                return True
            return False

        await eventually(rolled_back)
        await _live_build(ops, "ledger", "ledger.v1", writer)


async def test_drop_only_what_nobody_runs(ops: Ops, database: Database, projections: list[Projection]) -> None:
    async with running(database, projections, lease_seconds=0.5):
        await _all_live(ops, Writer(database))
        with pytest.raises(Conflict, match="is being run"):
            await ops.drop("ledger")
    async with running(database, projections[1:], lease_seconds=0.5):
        await ops.drop("ledger")
    assert [each.name for each in await ops.projections()] == ["rooms"]
    assert not [name for name in await database.list_collection_names() if name.startswith("ledger")]


# Aggregates that are set aside


async def test_parked_list_retry_and_skip(ops: Ops, live: Writer, faults: Faults, database: Database) -> None:
    for name in ("a", "b", "c"):
        faults.fail(name, 2)
        await live.append(name, "counted", "counted", "counted")

    async def three_parked() -> bool:
        page = await ops.parked("ledger")
        return [(each.aggregate_id, each.state) for each in page.parked] == [(name, "parked") for name in "abc"]

    await eventually(three_parked)
    page = await ops.parked("ledger", limit=2)
    assert [each.aggregate_id for each in page.parked] == ["a", "b"]
    assert page.next is not None
    rest = await ops.parked("ledger", after=page.next, limit=2)
    assert [each.aggregate_id for each in rest.parked] == ["c"]
    assert rest.next is None
    assert "made to fail" in rest.parked[0].reason
    assert rest.parked[0].sequence_no == 2
    with pytest.raises(Invalid, match="limit"):
        await ops.parked("ledger", limit=0)
    waited = await ops.wait("ledger", "a", 3, timeout=0.1)
    assert waited.reason is not None
    assert "set aside at event 2" in waited.reason

    with pytest.raises(NotFound, match="'z'"):
        await ops.retry("ledger", "z")
    with pytest.raises(NotFound, match="'z'"):
        await ops.skip("ledger", "z", 2)
    with pytest.raises(Conflict, match="event 2 stands in the way of 'a', not 3"):
        await ops.skip("ledger", "a", 3)
    await ops.skip("ledger", "a", 2)
    assert (await ops.wait("ledger", "a", 3)).reached
    assert (await documents(database, "ledger"))["a"]["applied"] == [1, 3]

    faults.heal()
    assert await ops.retry("ledger") >= 2
    for name in ("b", "c"):
        assert (await ops.wait("ledger", name, 3)).reached


# Reading one's own writes


async def test_what_was_waited_for_is_shown(ops: Ops, live: Writer, database: Database) -> None:
    """By several writers at once, and while a rebuild cuts over in between."""

    async def write_and_read(aggregate_id: str) -> None:
        for number in range(1, 31):
            await live.append(aggregate_id, rooms=["r"])
            waited = await ops.wait("ledger", aggregate_id, number)
            assert waited.reached, waited
            shown = await database["ledger"].find_one({"_id": aggregate_id})
            assert shown is not None
            assert shown["applied"][:number] == list(range(1, number + 1))
            if number % 10 == 0:
                assert (await ops.wait("rooms", aggregate_id, number)).reached
                room = await database["rooms"].find_one({"_id": "r"})
                assert room is not None
                assert room["applied"][aggregate_id][number - 1] == number

    await ops.rebuild("ledger")
    await asyncio.gather(*(write_and_read(f"a{number}") for number in range(8)))


async def test_waiting_for_events_without_a_handler_and_for_none(ops: Ops, live: Writer) -> None:
    await live.append("a", "counted", "noise", "noise")
    assert (await ops.wait("ledger", "a", 3)).reached
    await live.append("b", "noise")
    assert (await ops.wait("ledger", "b", 1)).reached
    await live.append("c", "counted", "counted")  # handled, but it names no room
    assert (await ops.wait("rooms", "c", 2)).reached
    # What does not come ends the wait, and what comes late is waited for.
    await live.append("d")
    assert (await ops.wait("ledger", "d", 1)).reached
    waited = await ops.wait("ledger", "d", 2, timeout=0.3)
    assert (waited.reached, waited.mark) == (False, 1)
    assert waited.reason == "the log has no event 2 of this aggregate"
    with pytest.raises(Invalid, match="sequenceNo"):
        await ops.wait("ledger", "d", 0)
    waiting = asyncio.create_task(ops.wait("ledger", "e", 2, timeout=20))
    await live.append("e", "counted", "noise")
    assert (await waiting).reached


# Verifying


async def _filled(ops: Ops, writer: Writer) -> None:
    for number in range(30):
        names = ("counted", "noise", "counted", "closed")[: 1 + number % 4]
        await writer.append(f"a{number}", *names, rooms=[f"r{number % 3}", "all"])
    for name in ("ledger", "rooms"):
        for aggregate_id, head in writer.heads.items():
            assert (await ops.wait(name, aggregate_id, head)).reached


async def _findings(ops: Ops, name: str) -> list[tuple[str, Any]]:
    found = await ops.verify(name)
    assert not found.ok
    return sorted((finding.kind, finding.key) for finding in found.findings)


async def test_a_right_read_model_is_verified_while_writers_go_on(ops: Ops, live: Writer, database: Database) -> None:
    await _filled(ops, live)
    for name, count in (("ledger", 30), ("rooms", 4)):
        found = await ops.verify(name)
        assert found.ok, found
        assert found.documents == count
        assert (await ops.verify(name, sample=2)).ok
    # The command has no Python code unless it is told where it is.
    without_code = Ops(database, database)
    for verb in (without_code.verify("ledger"), without_code.rebuild("ledger")):
        with pytest.raises(Conflict, match="name its module"):
            await verb
    await live.append("b")
    assert (await without_code.wait("ledger", "b", 1)).reached
    # Writers may go on meanwhile.
    stopping = asyncio.Event()

    async def write(aggregate_id: str) -> None:
        while not stopping.is_set():
            await live.append(aggregate_id, "counted", "noise", rooms=["r", aggregate_id])

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(write(f"a{number}"))
        try:
            for _ in range(5):
                for name in ("ledger", "rooms"):
                    found = await ops.verify(name)
                    assert found.ok, found
        finally:
            stopping.set()


async def test_wrong_documents_are_found(ops: Ops, live: Writer, database: Database) -> None:
    await _filled(ops, live)
    await database["ledger.v1"].update_one({"_id": "a0"}, {"$push": {"applied": 9}})
    await database["ledger.v1"].update_one({"_id": "a1"}, {"$set": {"more": True}})
    await database["ledger.v1"].update_one({"_id": "a4"}, {"$unset": {"applied": 1}})
    assert await _findings(ops, "ledger") == [("document", name) for name in ("a0", "a1", "a4")]
    await database["rooms.v1"].delete_one({"_id": "r0"})
    await database["rooms.v1"].insert_one({"_id": "r9", "applied": {}})
    await database["rooms.v1"].update_one({"_id": "r1"}, {"$set": {"applied": {}}})
    assert await _findings(ops, "rooms") == [("document", name) for name in ("r0", "r1", "r9")]
    # They are bounded.
    events = [live.next(f"b{number:03}") for number in range(300)]
    await live.insert(events)
    for each in events:
        assert (await ops.wait("ledger", each["aggregateId"], 1)).reached
    await database["ledger.v1"].update_many({}, {"$set": {"more": True}})
    found = await ops.verify("ledger")
    assert len(found.findings) == 100
    assert found.truncated


async def test_a_document_that_was_deleted_by_hand_is_found(
    ops: Ops, database: Database, projections: list[Projection]
) -> None:
    """Its mark is gone with it. A projector would put it right when it begins anew, so none runs."""
    async with running(database, projections, lease_seconds=0.5):
        writer = Writer(database)
        await _all_live(ops, writer)
        await _filled(ops, writer)
    await database["ledger.v1"].delete_one({"_id": "a0"})
    assert await _findings(ops, "ledger") == [("behind", "a0")]


async def test_a_log_that_lost_events_and_parked_aggregates_are_found(
    ops: Ops, live: Writer, database: Database, faults: Faults
) -> None:
    await _filled(ops, live)
    faults.fail("parked", 2)
    await live.append("parked", "counted", "counted")

    async def parked() -> bool:
        return bool((await ops.parked("ledger")).parked)

    await eventually(parked)
    await database[EVENTS].delete_one({"aggregateId": "a2", "sequenceNo": 3})  # the last one
    await database[EVENTS].delete_one({"aggregateId": "a6", "sequenceNo": 1})
    kinds = await _findings(ops, "ledger")
    assert ("ahead", "a2") in kinds
    assert ("gap", "a6") in kinds
    assert ("parked", "parked") in kinds
    assert {key for _, key in kinds} == {"a2", "a6", "parked"}
