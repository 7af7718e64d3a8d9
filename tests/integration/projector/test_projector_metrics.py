"""What the metrics tell in each situation: idle is not lag, and what stands still shows."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from projector import loop as loop_module
from projector import status
from projector.builds import set_control
from projector.catalog import read_statuses
from projector.metrics import HEALTH_STATES, Metrics
from tests.eventually import eventually, eventually_equal
from tests.projecting import Faults, Writer, all_events, documents, expected_ledgers, ledger, metric, running, same

if TYPE_CHECKING:
    import pytest

    from eventstore.client import Database

LABEL = {"projection": "ledger"}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    found = metric(metrics, name, **LABEL, **labels)
    assert found is not None, f"{name} has no sample"
    return found


async def test_idle_is_not_lag_and_the_heart_beats(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "IDLE_CHECKPOINT_SECONDS", 0.2)
    metrics, writer = Metrics(), Writer(database)
    async with running(database, [ledger()], metrics, lease_seconds=1.0) as supervisor:
        await writer.append("a")
        await eventually_equal(lambda: documents(database, "ledger"), expected_ledgers(await all_events(database)))
        await eventually(same(lambda: health(metrics) == {"live"}))
        beats = value(metrics, "projector_heartbeat_timestamp_seconds")
        ticks = supervisor.last_tick
        await eventually(same(lambda: value(metrics, "projector_heartbeat_timestamp_seconds") > beats + 1))
        assert supervisor.last_tick > ticks
        for name in ("projector_lag_seconds", "projector_backlog_events"):
            assert value(metrics, name) == 0
        assert value(metrics, "projector_resume_token_age_seconds") < 15  # an idle server writes to its oplog every ten
        [state] = (await read_statuses(database)).values()
        assert (state.state, state.lag_seconds, state.backlog_events, state.parked) == ("live", 0, 0, 0)


def health(metrics: Metrics) -> set[str]:
    return {state for state in HEALTH_STATES if metric(metrics, "projector_health", **LABEL, state=state)}


async def test_what_cannot_be_written_shows_as_lag_and_backlog(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, writer = Metrics(), Writer(database)
    go_on = asyncio.Event()
    real = loop_module.Loop._transaction

    async def stands(self: Any, *rest: Any) -> None:
        await go_on.wait()
        await real(self, *rest)

    async with running(database, [ledger()], metrics, lease_seconds=1.0):
        await writer.append("a")
        await eventually_equal(lambda: documents(database, "ledger"), expected_ledgers(await all_events(database)))
        monkeypatch.setattr(loop_module.Loop, "_transaction", stands)
        for _ in range(5):
            await writer.append("a")
        await eventually(same(lambda: value(metrics, "projector_lag_seconds") > 1))
        assert value(metrics, "projector_backlog_events") >= 1
        assert value(metrics, "projector_resume_token_age_seconds") > 1
        go_on.set()
        await eventually_equal(lambda: documents(database, "ledger"), expected_ledgers(await all_events(database)))
        await eventually(same(lambda: value(metrics, "projector_lag_seconds") == 0))
        assert value(metrics, "projector_backlog_events") == 0


async def test_every_event_is_counted_once(database: Database) -> None:
    metrics, writer, faults = Metrics(), Writer(database), Faults()
    async with running(database, [ledger(faults)], metrics, lease_seconds=1.0):
        await eventually(same(lambda: health(metrics) == {"live"}))
        faults.fail("bad", 2)
        await writer.append("a", "counted", "noise", "counted")
        await writer.append("bad", "counted", "counted", "counted")
        others = expected_ledgers(
            [e for e in await all_events(database) if e["aggregateId"] == "a" or e["sequenceNo"] < 2]
        )
        await eventually_equal(lambda: documents(database, "ledger"), others)
        await eventually(same(lambda: value(metrics, "projector_parked_aggregates", state="retrying") == 1))
        counts = {
            o: value(metrics, "projector_events_processed_total", outcome=o)
            for o in ("unhandled", "duplicate", "aside", "skipped")
        }
        assert counts == {"unhandled": 1, "duplicate": 0, "aside": 2, "skipped": 0}
        # "bad" 1 was applied with the batch, or when it was read again.
        assert sum(value(metrics, "projector_events_processed_total", outcome=o) for o in ("applied", "healed")) in (
            3,
            4,
        )
        assert value(metrics, "projector_events_processed_total", outcome="failed") >= 1
        assert value(metrics, "projector_write_batch_events_count") >= 1
        assert value(metrics, "projector_event_delay_seconds_count") >= 1
        assert value(metrics, "projector_last_applied_timestamp_seconds") > 0


async def test_a_replica_without_partitions_says_nothing_of_the_past(database: Database) -> None:
    """Gauges of what it ran once would raise alarms for ever."""
    metrics, writer, faults = Metrics(), Writer(database), Faults()
    faults.fail("a", 1)
    async with running(database, [ledger(faults)], metrics, lease_seconds=1.0):
        await eventually(same(lambda: health(metrics) == {"live"}))
        assert await set_control(database, "ledger", partitions=3)
        await writer.append("a")
        await writer.append("b")
        await eventually(same(lambda: value(metrics, "projector_parked_aggregates", state="retrying") == 1))
        await eventually(same(lambda: value(metrics, "projector_partitions_owned") == 3))
        await set_control(database, "ledger", paused=True)
        await eventually(same(lambda: value(metrics, "projector_partitions_owned") == 0))
        for name in ("lag_seconds", "backlog_events", "resume_token_age_seconds", "parked_oldest_timestamp_seconds"):
            assert value(metrics, f"projector_{name}") == 0
        assert value(metrics, "projector_parked_aggregates", state="retrying") == 0


async def test_the_oplog_window_is_absent_where_it_may_not_be_read(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics()
    monkeypatch.setattr(status, "OPLOG_SECONDS", 0.0)
    async with running(database, [ledger()], metrics, lease_seconds=1.0):
        await eventually(same(lambda: metric(metrics, "projector_oplog_window_seconds") is not None))
        window = metric(metrics, "projector_oplog_window_seconds")
        assert window is not None
        assert window > 0

        async def refused(_: Any) -> None:
            return None

        monkeypatch.setattr(status, "oplog_start", refused)
        await eventually(same(lambda: metric(metrics, "projector_oplog_window_seconds") is None))
