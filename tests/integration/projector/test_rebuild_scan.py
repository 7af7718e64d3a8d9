"""The scan of the log for a new build: what it makes, whose it is, what it sets aside."""

from __future__ import annotations

import random
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import SecretStr
from pymongo.errors import OperationFailure

from eventstore.client import connect, open_database
from eventstore.event import EVENTS
from eventstore.indexes import provision
from projector import scans
from projector.builds import drop_build, read_builds, read_control
from projector.checkpoint import Checkpoint, FencedError
from projector.metrics import Metrics
from projector.ops import Ops
from projector.owned import MARK
from projector.parking import PARKED
from projector.projection import Projection
from projector.scan import Pace, Scanner
from projector.scans import SCANS
from tests.eventually import eventually, eventually_equal
from tests.projecting import (
    Faults,
    Writer,
    all_events,
    begun,
    cut_over_to,
    documents,
    expected_ledgers,
    ledger,
    only,
    running,
)

if TYPE_CHECKING:
    from eventstore.client import Client, Database
    from projector.build import Build


pytestmark = pytest.mark.usefixtures("tiny_scans")


async def scanner(database: Database, build: Build, owner: str, **changes: Any) -> Scanner:
    """A scanner that has just taken the scan over."""
    checkpoint = await Checkpoint.take(database, only(build), owner)
    await scans.begin(database, database, checkpoint, owner)
    return Scanner(database, database, build, pace=Pace(0), **({"retry_seconds": 60.0, "max_parked": 1_000} | changes))


async def marks(database: Database, build: Build) -> dict[str, int]:
    inside = {row["_id"]: row[MARK] async for row in database[build.collection].find()}
    return inside | {row["_id"]: row["mark"] async for row in database[build.marks].find()}


HISTORIES = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=3),
    st.lists(st.sampled_from(["counted", "closed", "noise"]), min_size=1, max_size=12),
    max_size=12,
)


@hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(histories=HISTORIES, seed=st.integers(0, 2**32))
async def test_a_scan_gives_what_a_fold_of_the_log_gives(
    client: Client, histories: dict[str, list[str]], seed: int
) -> None:
    name = f"test_{uuid.uuid4().hex[:12]}"
    database = open_database(client, name)
    await provision(database)
    writer = Writer(database)
    events = [writer.next(aggregate_id, each) for aggregate_id, names in histories.items() for each in names]
    random.Random(seed).shuffle(events)  # the order on disk must not matter
    if events:
        await database[EVENTS].insert_many(events)
    build = await begun(database, ledger())
    await (await scanner(database, build, "one")).run("one")
    assert await scans.finish(database, build.id, "one")
    assert await documents(database, build.collection) == expected_ledgers(events)
    handled = {key: len(names) for key, names in histories.items() if {"counted", "closed"} & set(names)}
    assert await marks(database, build) == handled
    progress = await scans.progress_of(database, build.id)
    assert progress is not None
    assert (progress.events, progress.ratio) == (len(events), 1.0)
    await client.drop_database(name)


async def test_a_scanner_that_is_no_longer_the_owner_writes_nothing(database: Database) -> None:
    writer = Writer(database)
    for number in range(20):
        await writer.append(f"a{number:02d}", "counted")
    build = await begun(database, ledger())
    stale = await scanner(database, build, "stale")
    claimed = await scans.claim(database, build.id, "stale")
    assert claimed is not None
    await scanner(database, build, "fresh")
    with pytest.raises(FencedError):
        await stale._scan(claimed)
    with pytest.raises(FencedError):
        await stale.run("stale")
    assert not await scans.finish(database, build.id, "stale")
    assert await documents(database, build.collection) == {}


async def test_a_scan_is_not_begun_by_a_partition_s_former_owner(database: Database) -> None:
    build = await begun(database, ledger())
    former = await Checkpoint.take(database, only(build), "former")
    await Checkpoint.take(database, only(build), "present")
    with pytest.raises(FencedError):
        await scans.begin(database, database, former, "former")
    assert await database[SCANS].count_documents({}) == 0


async def test_a_scan_of_a_dropped_build_ends_and_leaves_nothing(database: Database) -> None:
    writer = Writer(database)
    for number in range(20):
        await writer.append(f"a{number:02d}", "counted")
    build = await begun(database, ledger())
    one = await scanner(database, build, "one")
    claimed = await scans.claim(database, build.id, "one")
    assert claimed is not None
    record = (await read_builds(database))[build.id]
    await drop_build(database, record)
    await begun(database, ledger())  # the same name again
    await drop_build(database, record)
    with pytest.raises(FencedError):
        await one._scan(claimed)
    left = await database.list_collection_names()
    assert build.collection not in left
    assert await database[SCANS].count_documents({}) == 0


async def test_a_scan_goes_on_at_once_where_a_killed_one_left_a_transaction_open(
    database: Database, mongodb_uri: str
) -> None:
    writer = Writer(database)
    for number in range(20):
        await writer.append(f"a{number:02d}", "counted")
    build = await begun(database, ledger())
    async with connect(SecretStr(mongodb_uri), "projector") as killed:
        other = open_database(killed, database.name)
        await scanner(other, build, "killed")
        claimed = await scans.claim(other, build.id, "killed")
        assert claimed is not None
        session = killed.start_session()
        await session.start_transaction()  # and it is never heard of again
        await claimed.advance(other, "a03", 4, session)
        await other[build.collection].insert_one({"_id": "a03", "applied": ["torn"]}, session=session)
        await (await scanner(database, build, "fresh")).run("fresh")
        with pytest.raises(OperationFailure):
            await session.commit_transaction()
        await session.end_session()
    assert await documents(database, build.collection) == expected_ledgers(await all_events(database))


async def test_what_another_owner_wrote_is_not_written_again(database: Database) -> None:
    writer = Writer(database)
    for number in range(40):
        await writer.append(f"a{number:02d}", "counted", "counted")
    build = await begun(database, ledger())
    first = await scanner(database, build, "first")
    claimed = await scans.claim(database, build.id, "first")
    assert claimed is not None
    await first._scan(claimed)
    done = await database[build.collection].find().to_list()
    assert 0 < len(done) < 40
    # If any of these were read again, the second scan would bring them back.
    await database[build.collection].delete_many({})
    second = await scanner(database, build, "second")
    progress = await scans.progress_of(database, build.id)
    assert progress is not None
    assert progress.events == 2 * len(done)
    await second.run("second")
    rest = await documents(database, build.collection)
    assert rest.keys() == writer.heads.keys() - {row["_id"] for row in done}


async def test_a_gap_and_a_failing_event_have_the_promised_end(database: Database) -> None:
    faults, writer = Faults(), Writer(database)
    for name in ("good", "broken", "gap"):
        await writer.append(name, *["counted"] * 5)
    await database[EVENTS].delete_one({"aggregateId": "gap", "sequenceNo": 3})
    faults.fail("broken", 4)
    metrics = Metrics()
    async with running(database, [ledger(faults)], metrics, retry_seconds=0.3):
        await cut_over_to(database, "ledger", "ledger.v1")

        async def parked() -> dict[str, tuple[int, str, str]]:
            return {
                row["aggregateId"]: (row["sequenceNo"], row["category"], row["state"])
                async for row in database[PARKED].find()
            }

        await eventually_equal(parked, {"broken": (4, "fold", "parked"), "gap": (3, "gap", "parked")})
        shown = await documents(database, "ledger")
        assert {key: row["applied"] for key, row in shown.items()} == {
            "good": [1, 2, 3, 4, 5],
            "broken": [1, 2, 3],
            "gap": [1, 2],
        }
        await writer.append("good", "counted")
        faults.heal()
        ops = Ops(database, database)
        await ops.retry("ledger", "broken")
        await ops.skip("ledger", "gap", 3)

        async def applied() -> dict[str, list[int]]:
            return {key: row["applied"] for key, row in (await documents(database, "ledger")).items()}

        await eventually_equal(applied, {"good": [1, 2, 3, 4, 5, 6], "broken": [1, 2, 3, 4, 5], "gap": [1, 2, 4, 5]})


async def test_documents_that_cannot_be_stored_are_set_aside_and_the_others_are_written(database: Database) -> None:
    projection = Projection("totals")

    @projection.on("counted")
    def _(state: dict[str, Any], event: dict[str, Any]) -> None:
        state["value"] = event["payload"]["value"] if event["payload"]["value"] != "huge" else 2**70
        state["text"] = "x" * (17 * 2**20) if event["payload"]["value"] == "long" else ""

    writer = Writer(database)
    for name, value in (("a", 1), ("b", "huge"), ("c", 1), ("d", 2), ("e", "long")):
        await writer.append(name, value=value)
    build = await begun(database, projection)
    await database[build.collection].create_index("value", unique=True)
    await (await scanner(database, build, "one")).run("one")
    assert await scans.finish(database, build.id, "one")
    stored = await documents(database, build.collection)
    assert set(stored) in ({"a", "d"}, {"c", "d"})
    rows = await database[PARKED].find().to_list()
    assert {row["aggregateId"] for row in rows} == {"a", "b", "c", "e", "d"} - set(stored)
    assert {(row["category"], row["sequenceNo"]) for row in rows} == {("write", 1)}


async def test_too_many_failures_stop_the_projection(database: Database) -> None:
    faults, writer = Faults(), Writer(database)
    for number in range(10):
        await writer.append(f"a{number}", "counted")
        faults.fail(f"a{number}", 1)
    async with running(database, [ledger(faults)], max_parked=5):

        async def failed() -> str | None:
            control = await read_control(database, "ledger")
            return control.failed if control else None

        assert "more than 5 aggregates are set aside" in str(await eventually(failed))
        assert await database[PARKED].count_documents({}) <= 6
