"""The appender's small parts."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import bson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from appender import openapi
from appender.encoding import encode_event, same
from appender.heads import CONTENDED_AGGREGATES, Heads
from appender.history import encode_stored
from appender.metrics import RETRIES, Metrics
from appender.problems import TYPES, Invalid
from appender.requests import NewEvent
from appender.settings import AppenderSettings
from appender.write import Outcome, document
from eventstore.client import CODEC

ROOT = Path(__file__).parents[2]

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0.$"), max_size=8), inner, max_size=4
        )
    ),
    max_leaves=12,
)
PAYLOADS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0.$"), max_size=8), JSON, max_size=5
)


def test_the_committed_openapi_document_is_current() -> None:
    committed = (ROOT / "docs" / "openapi.json").read_bytes()
    assert committed == openapi.encode(), "write it anew: python -m appender.openapi > docs/openapi.json"


@given(payload=PAYLOADS, metadata=st.none() | PAYLOADS)
def test_what_comes_out_of_the_log_is_what_went_in(payload: dict[str, Any], metadata: dict[str, Any] | None) -> None:
    event = encode_event(NewEvent("x", payload, "e", metadata=metadata), 1 << 20, "")
    stored = bson.decode(bson.encode(document(event, "a", 7)), CODEC)
    shown = json.loads(encode_stored(stored))
    assert shown["payload"] == payload
    assert shown.get("metadata") == metadata
    assert shown["sequenceNo"] == 7
    assert same(event, "a", stored)
    assert not same(event, "b", stored)
    assert not same(event, "a", stored | {"payload": payload | {"another": 1}})


OFFSETS = st.integers(-23 * 60, 23 * 60).map(lambda minutes: datetime.timezone(datetime.timedelta(minutes=minutes)))


@given(st.datetimes(timezones=OFFSETS))
def test_a_timestamp_keeps_its_millisecond(when: datetime.datetime) -> None:
    try:
        utc = when.astimezone(datetime.UTC)
    except OverflowError:
        with pytest.raises(Invalid, match="timestamp"):
            encode_event(NewEvent("x", {}, "e", timestamp=when), 1 << 20, "")
        return
    event = encode_event(NewEvent("x", {}, "e", timestamp=when), 1 << 20, "")
    stored = bson.decode(bson.encode(document(event, "a", 1)), CODEC)
    assert stored["timestamp"] == utc.replace(microsecond=utc.microsecond // 1000 * 1000)
    assert same(event, "a", stored)


def test_heads_are_bounded_and_forget_the_oldest() -> None:
    heads = Heads(3)
    for number in range(5):
        heads.put(f"a{number}", number)
        assert heads.get("a0") == (0 if number < 5 else None)  # asked for each time: it stays
    assert len(heads) == 3
    assert [heads.get(f"a{number}") for number in range(5)] == [0, None, None, 3, 4]


def test_a_contended_aggregate_has_no_entry() -> None:
    heads = Heads(10)
    heads.put("a", 1)
    heads.conflicted("a")
    heads.put("a", 2)
    assert heads.contended("a")
    assert heads.get("a") is None
    for number in range(CONTENDED_AGGREGATES + 1):
        heads.conflicted(f"b{number}")
    assert not heads.contended("a")  # bounded: the oldest conflict is forgotten first


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("appender.example", False),
    ],
)
def test_beyond_loopback_a_token_is_required(host: str, loopback: bool, tmp_path: Path) -> None:
    assert AppenderSettings(host=host, token_file=tmp_path / "token").loopback is loopback
    if loopback:
        AppenderSettings(host=host)
    else:
        with pytest.raises(ValidationError, match="APPENDER_TOKEN_FILE"):
            AppenderSettings(host=host)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPENDER_PORT", "9000")
    monkeypatch.setenv("APPENDER_DEADLINE_SECONDS", "3")
    settings = AppenderSettings()
    assert (settings.port, settings.deadline_seconds, settings.host) == (9000, 3.0, "127.0.0.1")


def test_problem_types_are_stable() -> None:
    # Callers compare them: a change here is a breaking change of the API.
    assert {problem.name: problem.status for problem in TYPES} == {
        "malformed": 400,
        "unauthorized": 401,
        "not-found": 404,
        "method-not-allowed": 405,
        "request-timeout": 408,
        "sequence-conflict": 409,
        "event-id-conflict": 409,
        "too-large": 413,
        "unsupported-media-type": 415,
        "invalid": 422,
        "internal": 500,
        "unavailable": 503,
        "queue-full": 503,
        "draining": 503,
        "outcome-unknown": 503,
    }


def test_metric_names_and_labels() -> None:
    metrics = Metrics()
    found = {
        (family.name, tuple(sorted({label for sample in family.samples for label in sample.labels} - {"le"})))
        for family in metrics.registry.collect()
    }
    assert found == {
        ("appender_http_requests", ()),
        ("appender_http_request_duration_seconds", ()),
        ("appender_http_requests_in_progress", ()),
        ("appender_events_appended", ()),
        ("appender_append_conflicts", ()),
        ("appender_event_id_conflicts", ()),
        ("appender_idempotent_replays", ()),
        ("appender_transaction_retries", ("label",)),
        ("appender_batch_events", ()),
        ("appender_batch_duration_seconds", ("kind",)),
        ("appender_queue_events", ()),
        ("appender_queue_bytes", ()),
        ("appender_queue_oldest_age_seconds", ()),
        ("appender_batches_in_flight", ()),
        ("appender_heads_cached", ()),
        ("appender_http_connections", ()),
        ("appender_draining", ()),
        ("appender_build_info", ("version",)),
    }
    failures = set(Outcome) - {Outcome.WRITTEN, Outcome.NOT_TRIED, Outcome.REFUSED}
    assert set(RETRIES) == {outcome.value for outcome in failures}
