"""The small parts of the projector, without a server."""

from __future__ import annotations

import datetime

import pytest
from bson.timestamp import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from eventstore.event import SLOTS
from projector.changes import COMMAND_BYTES, Failure, Typical, _chunks
from projector.checkpoint import PartitionId
from projector.metrics import HEALTH_STATES, Metrics
from projector.parking import Parked
from projector.position import Position
from projector.scan import Pace
from projector.sources import _Share
from projector.stream import event_fields

HEX = "0123456789ABCDEF"


@given(seconds=st.integers(0, 2**32 - 1), increment=st.integers(0, 2**32 - 1), rest=st.text(HEX, max_size=40))
def test_a_position_knows_the_time_in_its_token(seconds: int, increment: int, rest: str) -> None:
    token = {"_data": f"82{seconds:08X}{increment:08X}{rest}"}
    position = Position.of(token, Timestamp(1, 1))
    assert position.cluster_time == Timestamp(seconds, increment)
    assert Position.load(position.dump()) == position


@pytest.mark.parametrize("data", ["", "8", "82", "8200", "83" + "0" * 16, "82" + "Z" * 16, b"82" + b"0" * 16, None])
def test_a_token_that_cannot_be_read_takes_the_time_at_hand(data: object) -> None:
    assert Position.of({"_data": data}, Timestamp(7, 8)).cluster_time == Timestamp(7, 8)


_TIMES = st.integers(1, 3).map(lambda seconds: Timestamp(seconds, 0))
_POSITIONS = st.builds(Position, st.sampled_from([None, {"_data": "a"}, {"_data": "b"}]), _TIMES)


@given(position=_POSITIONS, since=_POSITIONS)
def test_nobody_takes_a_place_at_a_stream_that_began_after_him(position: Position, since: Position) -> None:
    share = _Share(None)
    assert not share.reaches(position), "it does not stand anywhere yet"
    share.since = since
    assert share.reaches(since)
    if share.reaches(position):
        assert position.cluster_time >= since.cluster_time
    else:
        assert position.cluster_time <= since.cluster_time


@given(count=st.integers(1, 64))
def test_partitions_share_all_slots(count: int) -> None:
    shares = [PartitionId("b", number, count).slots for number in range(count)]
    assert [slot for share in shares for slot in share] == list(range(SLOTS))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.lists(st.integers(0, COMMAND_BYTES * 2), max_size=50))
def test_commands_hold_all_documents_and_not_too_many(sizes: list[int]) -> None:
    chunks = _chunks(sizes)
    assert [index for start, end in chunks for index in range(start, end)] == list(range(len(sizes)))
    for start, end in chunks:
        assert end - start == 1 or sum(sizes[start:end]) <= COMMAND_BYTES


def failure(sequence_no: int, category: str = "fold", event_id: str | None = None) -> Failure:
    return Failure("a", sequence_no, event_id, None, category, "why")


def test_a_failing_event_is_retried_for_a_while_and_then_parked() -> None:
    first = Parked.of("b", failure(3, event_id="e3"), None, retry_seconds=30)
    assert (first.state, first.attempts) == ("retrying", 1)
    assert first.is_due  # what comes before the event is to be folded, at once
    first.settled = True
    assert not first.is_due  # and the event itself after a pause
    first.due = first.since
    assert first.is_due
    first.since -= datetime.timedelta(seconds=29)
    second = Parked.of("b", failure(3), first, retry_seconds=30)
    assert (second.state, second.attempts, second.since, second.event_id) == ("retrying", 2, first.since, "e3")
    second.since -= datetime.timedelta(seconds=2)
    third = Parked.of("b", failure(3), second, retry_seconds=30)
    assert (third.state, third.attempts) == ("parked", 3)
    third.settled, third.due = True, first.since
    assert not third.is_due


def test_an_event_further_on_has_a_time_of_its_own() -> None:
    first = Parked.of("b", failure(3), None, retry_seconds=30)
    first.since -= datetime.timedelta(seconds=60)
    first.skips, first.revision, first.attempts = (1, 2), 5, 9
    later = Parked.of("b", failure(4), first, retry_seconds=30)
    assert (later.state, later.attempts, later.skips, later.revision) == ("retrying", 1, (1, 2), 5)
    assert Parked.of("b", failure(2), first, retry_seconds=30).state == "parked"


def test_pauses_grow_and_end_somewhere() -> None:
    record: Parked | None = None
    pauses = []
    for _ in range(40):
        before = datetime.datetime.now(datetime.UTC)
        record = Parked.of("b", failure(1), record, retry_seconds=1e9)
        pauses.append((record.due - before).total_seconds())
    assert pauses[0] < 0.5
    assert max(pauses) <= 10.5
    assert min(pauses[10:]) >= 5


def test_what_was_applied_and_is_gone_is_parked_at_once() -> None:
    assert Parked.of("b", failure(3, "reset"), None, retry_seconds=3600).state == "parked"


def test_a_record_survives_its_document() -> None:
    record = Parked.of("b", failure(3, event_id="e3"), None, retry_seconds=30)
    record.skips, record.revision = (1,), 2
    assert Parked.load(record.dump()) == record


def test_large_and_slow_ones_count_at_once_and_are_forgotten_slowly() -> None:
    typical = Typical()
    guess = typical.bytes
    typical.learn_bytes(0, 0)
    assert typical.bytes == guess
    typical.learn_bytes(10, 10 * 2**20)
    assert typical.bytes == 2**20
    typical.learn_bytes(10, 10)
    assert 2**19 < typical.bytes < 2**20
    for _ in range(200):
        typical.learn_bytes(1, 100)
        typical.learn_fold(100, 0.0)
        typical.learn_write(100, 1.0)
    assert typical.bytes < 200
    assert 0 < typical.fold_seconds < 1e-5
    assert typical.write_seconds == 0.01


def test_fields_are_asked_for_once() -> None:
    stage = event_fields(["payload.a.b", "payload.a", "metadata", "metadata.source", "_id", "slot"])
    paths = sorted(path for path in stage if path.startswith("fullDocument."))
    assert paths == [
        f"fullDocument.{name}"
        for name in ("_id", "aggregateId", "eventName", "metadata", "payload.a", "sequenceNo", "slot")
    ]


def test_health_is_one_hot() -> None:
    metrics = Metrics()
    metrics.start("p")
    for state in HEALTH_STATES:
        metrics.set_health("p", state)
        values = {
            each: metrics.registry.get_sample_value("projector_health", {"projection": "p", "state": each})
            for each in HEALTH_STATES
        }
        assert values == {each: float(each == state) for each in HEALTH_STATES}


def test_the_oplog_window_has_no_sample_until_it_is_known() -> None:
    metrics = Metrics()
    name = "projector_oplog_window_seconds"
    for seconds in (None, 5.0, 6.0, None, None, 7.0):
        metrics.set_oplog_window(seconds)
        assert metrics.registry.get_sample_value(name) == seconds


async def test_a_scan_is_held_to_its_pace_and_catches_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("projector.scan.asyncio.sleep", sleep)
    monkeypatch.setattr("projector.scan.time.monotonic", lambda: now)
    pace = Pace(1_000)
    for _ in range(11):
        await pace.spend(100)
    assert now == pytest.approx(101)
    now += 60  # the scan was slow for a while
    for _ in range(11):
        await pace.spend(100)
    assert now == pytest.approx(162)
    free = Pace(0)
    await free.spend(1_000_000)
    assert now == pytest.approx(162)
