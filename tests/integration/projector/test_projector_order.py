"""Order check and aggregates aside: whatever is wrong with one aggregate, it comes to its promised state, and all others go on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from eventstore.event import EVENTS
from projector.aside import StoppedError
from projector.metrics import Metrics
from projector.parking import retry_parked, skip_parked
from projector.partition import Partition
from tests.eventually import eventually, eventually_equal
from tests.projecting import (
    KINDS,
    Faults,
    Here,
    Writer,
    all_events,
    aside_at,
    begun,
    documents,
    event,
    expected_ledgers,
    ledger,
    metric,
    only,
    parked,
    same,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from eventstore.client import Database
    from projector.build import Build

    Model = Callable[[], Awaitable[dict[Any, Any]]]


def model(database: Database, build: Build) -> Model:
    return lambda: documents(database, build.collection)


async def remove(database: Database, aggregate_id: str, *numbers: int) -> list[dict[str, Any]]:
    """Takes events out of the log by hand; returns them."""
    query = {"aggregateId": aggregate_id, "sequenceNo": {"$in": list(numbers)}}
    taken = await database[EVENTS].find(query).to_list()
    await database[EVENTS].delete_many(query)
    return taken


@KINDS
async def test_a_gap_is_healed_from_the_log(
    database: Database, monkeypatch: pytest.MonkeyPatch, make: Any, expect: Any
) -> None:
    """The stream skips events that the log has: a mark of an older position in memory could not be worse."""
    from projector import stream

    hidden = {("a", 2), ("a", 3), ("b", 1)}
    whole = stream.EventStream._batch

    def batch(self: stream.EventStream, reply: dict[str, Any]) -> stream.Batch:
        found = whole(self, reply)
        found.events = [e for e in found.events if (e["aggregateId"], e["sequenceNo"]) not in hidden]
        return found

    monkeypatch.setattr(stream.EventStream, "_batch", batch)
    build = await begun(database, make())
    writer, here = Writer(database), Here(database)
    async with here.runs(build, only(build)) as partition:
        await eventually(lambda: live(partition))
        await writer.append("a", "counted", "counted", "counted", "counted", rooms=["x"])
        await writer.append("b", "counted", "counted", rooms=["x", "y"])
        await eventually_equal(model(database, build), expect(await all_events(database)))
    assert metric(here.metrics, "projector_gaps_total", projection=build.projection.name) == 2
    assert await parked(database) == {}


async def live(partition: Partition) -> bool:
    return partition.progress.caught_up


@KINDS
async def test_what_the_log_lacks_sets_its_aggregate_aside_until_it_comes(
    database: Database, make: Any, expect: Any
) -> None:
    build = await begun(database, make())
    writer, here = Writer(database), Here(database)
    await writer.append("a", rooms=["x"])
    async with here.runs(build, only(build)) as partition:
        await eventually(lambda: live(partition))
        missing = writer.next("a", rooms=["x"])
        await writer.append("a", "counted", "counted", rooms=["x"])
        await writer.append("b", "counted", "counted", rooms=["x"])
        current = [e for e in await all_events(database) if e["sequenceNo"] == 1 or e["aggregateId"] == "b"]
        await eventually_equal(model(database, build), expect(current))
        record = (await eventually(lambda: parked(database)))["a"]
        assert (record["sequenceNo"], record["category"], record["state"]) == (2, "gap", "retrying")
        assert "no event 2" in record["reason"]

        await database[EVENTS].insert_one(missing)  # it comes late
        await eventually_equal(model(database, build), expect(await all_events(database)))
        await eventually_equal(lambda: parked(database), {})
        await writer.append("a", rooms=["x"])
        await eventually_equal(model(database, build), expect(await all_events(database)))


@KINDS
async def test_what_never_comes_is_parked_and_healed_by_a_retry(database: Database, make: Any, expect: Any) -> None:
    build = await begun(database, make())
    writer, here = Writer(database), Here(database, retry_seconds=0)
    async with here.runs(build, only(build)):
        await writer.append("a", rooms=["x"])
        missing = writer.next("a", rooms=["x"])
        await writer.append("a", rooms=["x"])
        record = (await eventually(lambda: parked(database)))["a"]
        assert (record["sequenceNo"], record["state"]) == (2, "parked")
        await database[EVENTS].insert_one(missing)
        await writer.append("b", rooms=["x"])
        others = [e for e in await all_events(database) if e["aggregateId"] == "b" or e["sequenceNo"] == 1]
        await eventually_equal(model(database, build), expect(others))
        assert (await parked(database))["a"]["state"] == "parked"  # nobody asked for it

        assert await retry_parked(database, build.id, "a") == 1
        await eventually_equal(model(database, build), expect(await all_events(database)))
        await eventually_equal(lambda: parked(database), {})


@KINDS
async def test_a_gap_can_be_skipped(database: Database, make: Any, expect: Any) -> None:
    build = await begun(database, make())
    writer, here = Writer(database), Here(database, retry_seconds=0)
    async with here.runs(build, only(build)):
        await writer.append("a", rooms=["x"])
        for _ in range(2):
            writer.next("a")
        await writer.append("a", rooms=["x"])
        await eventually(lambda: parked(database))
        assert not await skip_parked(database, build.id, "a", 3)  # it is aside at event 2, not at 3
        assert await skip_parked(database, build.id, "a", 2)
        await eventually(lambda: aside_at(database, "a", 3))
        assert await skip_parked(database, build.id, "a", 3)
        await eventually_equal(model(database, build), expect(await all_events(database)))
        await eventually_equal(lambda: parked(database), {})
        await writer.append("a", rooms=["x"])
        await eventually_equal(model(database, build), expect(await all_events(database)))
    assert (
        metric(here.metrics, "projector_events_processed_total", projection=build.projection.name, outcome="skipped")
        == 2
    )


@KINDS
async def test_an_event_that_fails_twice_is_applied_the_third_time(database: Database, make: Any, expect: Any) -> None:
    faults = Faults()
    build = await begun(database, make(faults))
    writer, here = Writer(database), Here(database)
    faults.fail("a", 2, times=2)
    async with here.runs(build, only(build)):
        await writer.insert([writer.next(each, rooms=["x"]) for each in ("a", "b", "a", "a", "b")])
        await eventually_equal(model(database, build), expect(await all_events(database)))
        await eventually_equal(lambda: parked(database), {})
    assert metric(here.metrics, "projector_dead_letters_total", projection=build.projection.name) == 0
    assert (
        metric(here.metrics, "projector_events_processed_total", projection=build.projection.name, outcome="failed")
        == 2
    )


@KINDS
async def test_an_event_that_always_fails_parks_its_aggregate_just_before_it(
    database: Database, make: Any, expect: Any
) -> None:
    faults = Faults()
    build = await begun(database, make(faults))
    writer, here = Writer(database), Here(database, retry_seconds=0.5)
    faults.fail("a", 3)
    async with here.runs(build, only(build)):
        await writer.insert([writer.next(each, rooms=["x"]) for each in ("a", "b", "a", "a", "a", "b")])
        events = await all_events(database)
        before = [e for e in events if e["aggregateId"] == "b" or e["sequenceNo"] < 3]
        await eventually_equal(model(database, build), expect(before))
        await eventually(lambda: aside_at(database, "a", 3))
        record = (await parked(database))["a"]
        assert record["category"] == "fold"
        assert "made to fail" in record["reason"]
        assert record["eventName"] == "counted"
        assert record["eventId"] == next(e["_id"] for e in events if (e["aggregateId"], e["sequenceNo"]) == ("a", 3))
        assert record["attempts"] > 1
        await writer.append("a", rooms=["x"])  # it stays aside
        await writer.append("b", rooms=["x"])
        before += [e for e in await all_events(database) if (e["aggregateId"], e["sequenceNo"]) == ("b", 3)]
        await eventually_equal(model(database, build), expect(before))

        assert await skip_parked(database, build.id, "a", 3)
        rest = [e for e in await all_events(database) if (e["aggregateId"], e["sequenceNo"]) != ("a", 3)]
        await eventually_equal(model(database, build), expect(rest))
        await eventually_equal(lambda: parked(database), {})
    name = build.projection.name
    assert metric(here.metrics, "projector_dead_letters_total", projection=name) == 1
    applied = sum(
        metric(here.metrics, "projector_events_processed_total", projection=name, outcome=o) or 0
        for o in ("applied", "healed")
    )
    assert applied >= 7


@KINDS
async def test_poison_at_the_start_does_not_hold_the_start_up(database: Database, make: Any, expect: Any) -> None:
    """The first event of all fails, before and after a restart, and so it does in the scan of a new build."""
    faults = Faults()
    faults.fail("a", 1)
    build = await begun(database, make(faults))
    writer = Writer(database)
    await writer.append("a", rooms=["x"])
    await writer.append("b", rooms=["x"])
    others = expect([e for e in await all_events(database) if e["aggregateId"] == "b"])
    for _ in range(2):
        here = Here(database, retry_seconds=0)
        async with here.runs(build, only(build)):
            await eventually_equal(model(database, build), others)
            await eventually(lambda: aside_at(database, "a", 1))
    faults.heal()
    async with Here(database).runs(build, only(build)):
        await retry_parked(database, build.id)
        await eventually_equal(model(database, build), expect(await all_events(database)))


@KINDS
async def test_duplicates_are_counted_and_change_nothing(database: Database, make: Any, expect: Any) -> None:
    from projector.checkpoint import CHECKPOINTS

    build = await begun(database, make())
    writer, here = Writer(database), Here(database)
    async with here.runs(build, only(build)) as partition:
        await eventually(lambda: live(partition))
    old = await database[CHECKPOINTS].find_one({"build": build.id}, {"_id": 0, "token": 1, "clusterTime": 1})
    assert old is not None
    async with here.runs(build, only(build)):
        await writer.append("a", *["counted"] * 5, rooms=["x"])
        await eventually_equal(model(database, build), expect(await all_events(database)))
    await database[CHECKPOINTS].update_one({"build": build.id}, {"$set": old})
    again = Here(database)
    async with again.runs(build, only(build)):
        await writer.append("a", rooms=["x"])
        await eventually_equal(model(database, build), expect(await all_events(database)))
    assert metric(again.metrics, "projector_duplicates_skipped_total", projection=build.projection.name) == 5


@KINDS
async def test_events_without_a_handler_pass_also_after_a_restart(database: Database, make: Any, expect: Any) -> None:
    build = await begun(database, make())
    writer = Writer(database)
    for number in range(3):  # each a restart, in which marks of unhandled events are forgotten
        here = Here(database)
        async with here.runs(build, only(build)) as partition:
            for names in (["counted", "noise"], ["noise", "noise"], ["counted", "noise", "noise"])[number:]:
                await writer.append("a", *names, rooms=["x"])
                await writer.append(f"only-noise-{number}", "noise")
            await eventually_equal(model(database, build), expect(await all_events(database)))
            await eventually(lambda: live(partition))
        assert await parked(database) == {}


async def test_thousands_of_gaps_are_read_in_groups(database: Database, client: Any) -> None:
    """After a restart every aggregate with unhandled events shows a gap: they must not cost a round trip each."""
    build = await begun(database, ledger())
    writer = Writer(database)
    names = [f"aggregate-{number:04}" for number in range(1_000)]
    here = Here(database)
    async with here.runs(build, only(build)):
        await writer.insert([writer.next(name, "noise") for name in names])
        unhandled = {"projection": "ledger", "outcome": "unhandled"}
        await eventually(same(lambda: metric(here.metrics, "projector_events_processed_total", **unhandled) == 1_000))
    here = Here(database)
    before = await queries(client)
    async with here.runs(build, only(build)) as partition:
        await writer.insert([writer.next(name) for name in names])
        await eventually_equal(model(database, build), expected_ledgers(await all_events(database)))
        await eventually(lambda: live(partition))
    assert metric(here.metrics, "projector_gaps_total", projection="ledger") == 1_000
    assert await queries(client) - before < 300


async def queries(client: Any) -> int:
    status = await client.admin.command("serverStatus", opcounters=1)
    return int(status["opcounters"]["query"])


@KINDS
async def test_too_many_aside_stop_the_projection_loudly(database: Database, make: Any, expect: Any) -> None:
    faults = Faults()
    build = await begun(database, make(faults))
    writer = Writer(database)
    here = Here(database, max_parked=3, retry_seconds=0)
    for number in range(4):
        faults.fail(f"bad-{number}", 1)
    partition = Partition(here, build, only(build))
    await writer.append("good", rooms=["x"])
    for number in range(4):
        await writer.append(f"bad-{number}", rooms=["x"])
    with pytest.raises(StoppedError, match="more than 3 aggregates are set aside"):
        await partition.run()
    assert len(await parked(database)) <= 3
    faults.heal()  # a person mended the code, and resumes
    async with Here(database).runs(build, only(build)):
        await retry_parked(database, build.id)
        await eventually_equal(model(database, build), expect(await all_events(database)))
        await eventually_equal(lambda: parked(database), {})


# Documents that cannot be stored


async def test_a_later_event_does_not_make_good_what_a_gap_left_open(database: Database) -> None:
    """A missing event comes after later ones have passed: it alone must not let its aggregate go."""
    build = await begun(database, ledger())
    writer, here = Writer(database), Here(database)
    async with here.runs(build, only(build)):
        first, second, third = (writer.next("a") for _ in range(3))
        await database[EVENTS].insert_one(third)
        await eventually(lambda: aside_at(database, "a", 1, "retrying"))
        await database[EVENTS].insert_one(first)
        await eventually(lambda: aside_at(database, "a", 2, "retrying"))
        await database[EVENTS].insert_one(second)
        await eventually_equal(model(database, build), {"a": {"_id": "a", "applied": [1, 2, 3]}})
        await eventually_equal(lambda: parked(database), {})


async def test_what_was_applied_and_is_gone_from_the_log_is_never_passed_over(database: Database) -> None:
    """The log begins anew under the same ids: nothing tells its events from those applied, so a person must judge."""
    from projector.checkpoint import CHECKPOINTS

    build = await begun(database, ledger())
    writer = Writer(database)
    async with Here(database).runs(build, only(build)):
        await writer.append("a", "counted", "counted", "counted")
        await writer.append("b", "counted")
        await eventually_equal(model(database, build), expected_ledgers(await all_events(database)))
    await remove(database, "a", 2, 3)
    # The position is lost, which brings the repair and its comparison about.
    await database[CHECKPOINTS].update_one({"build": build.id}, {"$set": {"token": {"_data": "8200"}}})
    here = Here(database)
    async with here.runs(build, only(build)):
        await eventually(lambda: aside_at(database, "a", 3))
        assert (await parked(database))["a"]["category"] == "reset"
        again = event("a", 2)
        await database[EVENTS].insert_one(again)
        await writer.append("b")
        await eventually_equal(
            model(database, build), {"a": {"_id": "a", "applied": [1, 2, 3]}, "b": {"_id": "b", "applied": [1, 2]}}
        )
        assert (await parked(database))["a"]["category"] == "reset"
        await retry_parked(database, build.id, "a")
        await eventually(lambda: attempts_of(database, "a", 1))
        assert await aside_at(database, "a", 3)  # the log is still shorter than what was applied
        await database[EVENTS].insert_many([event("a", 3), event("a", 4)])
        await retry_parked(database, build.id, "a")
        await eventually_equal(lambda: parked(database), {})
        await eventually_equal(
            model(database, build), {"a": {"_id": "a", "applied": [1, 2, 3, 4]}, "b": {"_id": "b", "applied": [1, 2]}}
        )


async def attempts_of(database: Database, aggregate_id: str, least: int) -> bool:
    record = (await parked(database)).get(aggregate_id)
    return record is not None and record["state"] == "parked" and record["attempts"] >= least


async def test_the_metrics_of_aggregates_aside(database: Database) -> None:
    from tests.projecting import running

    faults, metrics, writer = Faults(), Metrics(), Writer(database)
    faults.fail("a", 1)
    faults.fail("c", 1)
    async with running(database, [ledger(faults)], metrics, retry_seconds=0) as supervisor:
        await writer.append("a")
        await writer.append("b")
        await writer.append("c")

        async def both_parked() -> bool:
            return metric(metrics, "projector_parked_aggregates", projection="ledger", state="parked") == 2

        await eventually(both_parked)
        oldest = metric(metrics, "projector_parked_oldest_timestamp_seconds", projection="ledger")
        records = await parked(database)
        assert oldest is not None
        assert abs(oldest - min(r["since"].timestamp() for r in records.values())) < 0.01
        faults.heal()
        await retry_parked(database, "ledger.v1")

        async def none_parked() -> bool:
            return metric(metrics, "projector_parked_aggregates", projection="ledger", state="parked") == 0

        await eventually(none_parked)
        await eventually_equal(lambda: documents(database, "ledger.v1"), expected_ledgers(await all_events(database)))
        assert supervisor.running
