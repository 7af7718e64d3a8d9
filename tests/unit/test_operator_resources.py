"""The CRDs, the reference page, conditions, coarse views and settings of the operator."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kubernetes_validate import validate

from projector.catalog import StatusRecord
from projector.declared import from_definition
from projector.operator.conditions import TYPES, Verdict, conditions_of, transitions
from projector.operator.crds import KINDS, manifest, render
from projector.operator.eventstore import index_of
from projector.operator.indexes import Index
from projector.operator.metrics import RESULTS, Metrics
from projector.operator.passes import Resource, brief, verdict_of
from projector.operator.projection import definition_of
from projector.operator.reference import page
from projector.operator.resources import EventStoreSpec, LogIndex, ProjectionSpec
from projector.operator.settings import OperatorSettings
from projector.operator.statuses import coarse, view_of

if TYPE_CHECKING:
    from projector.operator.resource_status import Condition

ROOT = Path(__file__).parents[2]
NOW = datetime.datetime(2026, 5, 1, 12, tzinfo=datetime.UTC)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_chart_has_the_crds_of_the_code(kind: Any) -> None:
    """`python -m projector.operator.crds` writes them."""
    committed = (ROOT / "deploy/helm/files/crds" / f"{kind.plural}.yaml").read_text()
    assert committed == render(kind)
    validate(yaml.safe_load(committed), "1.29", strict=True)


def test_the_reference_page_is_that_of_the_code() -> None:
    """`python -m projector.operator.reference` writes it."""
    assert (ROOT / "docs/reference/custom-resources.md").read_text() == page()


def test_every_field_is_described() -> None:
    def undescribed(schema: dict[str, Any], place: str) -> list[str]:
        found = [] if "description" in schema or place.endswith("]") else [place]
        for name, part in schema.get("properties", {}).items():
            found += undescribed(part, f"{place}.{name}")
        if "items" in schema:
            found += undescribed(schema["items"], f"{place}[]")
        return found

    for kind in KINDS:
        [version] = manifest(kind)["spec"]["versions"]
        schema = version["schema"]["openAPIV3Schema"]["properties"]
        assert undescribed(schema["spec"], f"{kind.name}.spec") == []
        assert undescribed(schema["status"], f"{kind.name}.status") == []


def test_a_resource_becomes_a_definition_that_compiles() -> None:
    spec = msgspec.convert(
        {
            "version": 3,
            "readModel": {
                "collection": "orders",
                "key": "$payload.customerId",
                "indexes": [
                    {"keys": [{"field": "b", "order": -1}, {"field": "a"}], "unique": True, "name": "b-a"},
                    {"keys": [{"field": "at"}], "expireAfterSeconds": 60},
                    {"keys": [{"field": "place", "order": "2dsphere"}], "partialFilter": {"open": True}},
                ],
            },
            "on": {"Opened": {"$set": {"status": "open"}}},
        },
        ProjectionSpec,
    )
    projection = from_definition(definition_of("orders", spec))
    assert projection.versioned == "orders.v3"
    assert [Index.from_document(index.model().document) for index in projection.indexes] == [
        Index("b-a", (("b", -1), ("a", 1)), unique=True),
        Index("at_1", (("at", 1),), expire_after_seconds=60),
        Index("place_2dsphere", (("place", "2dsphere"),), partial_filter={"open": True}),
    ]


def test_an_index_of_the_log() -> None:
    model = msgspec.convert(
        {
            "name": "i",
            "keys": [{"field": "a"}, {"field": "b", "order": -1}],
            "sparse": True,
            "collation": {"locale": "en", "caseLevel": True},
        },
        LogIndex,
    )
    assert index_of(model) == Index(
        "i", (("a", 1), ("b", -1)), sparse=True, collation={"locale": "en", "caseLevel": True}
    )
    assert EventStoreSpec().indexes == []


def test_conditions_keep_their_time_while_their_status_stays() -> None:
    first = conditions_of(Verdict("False", "Building", "a", progressing="Building: a"), 1, (), NOW)
    assert [one.type for one in first] == list(TYPES)
    later = NOW + datetime.timedelta(hours=1)
    second = conditions_of(Verdict("True", "Reconciled"), 2, first, later)
    times = {one.type: one.last_transition_time for one in second}
    assert times == {
        "Ready": "2026-05-01T13:00:00Z",
        "Progressing": "2026-05-01T13:00:00Z",
        "Degraded": "2026-05-01T12:00:00Z",
        "Paused": "2026-05-01T12:00:00Z",
    }
    assert {one.observed_generation for one in second} == {2}
    assert conditions_of(Verdict("True", "Reconciled"), 2, second, later) == second


verdicts = st.builds(
    Verdict,
    ready=st.sampled_from(["True", "False", "Unknown"]),
    reason=st.sampled_from(["One", "Two"]),
    message=st.text(max_size=3_000),
    progressing=st.sampled_from(["", "Building: a", "Rebuilding: b"]),
    degraded=st.sampled_from(["", "Conflict: a"]),
    paused=st.booleans(),
)


@given(history=st.lists(verdicts, min_size=1, max_size=6))
def test_events_are_told_once(history: list[Verdict]) -> None:
    before: list[Condition] = []
    for verdict in history:
        after = conditions_of(verdict, 1, before, NOW)
        assert all(one.reason and len(one.message) <= 2_000 for one in after)
        told = transitions(before, after)
        known = {(one.type, one.status, one.reason) for one in before}
        assert all((one.type, one.status, one.reason) not in known for one in told)
        assert transitions(after, conditions_of(verdict, 2, after, NOW)) == []
        before = after


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, 0), (0.99, 0), (1, 1), (4.9, 1), (5, 5), (59, 15), (61, 60), (10**6, 86_400)]
)
def test_a_lag_is_shown_in_steps(seconds: float, shown: int) -> None:
    assert coarse(seconds) == shown


def test_a_status_with_missing_fields_is_understood() -> None:
    assert view_of(None, 90).silent
    view = view_of(StatusRecord(name="orders"), 90)
    assert not view.silent
    old = StatusRecord(name="orders", lag_seconds=3, updated_at=NOW - datetime.timedelta(seconds=91))
    assert view_of(old, 90, NOW).silent
    assert view_of(old, 90, NOW).lag_seconds is None
    assert view_of(msgspec.structs.replace(old, rebuild={"percent": 77.7}), 100, NOW).rebuild_percent == 70


def test_an_unexpected_error_is_no_secret_and_no_crash() -> None:
    resource = Resource("EventStore", "ns", "main", "uid", 1, {}, {}, paused=False)
    found = verdict_of(RuntimeError("mongodb://user:secret@host/ is odd"), resource)
    assert (found.ready, found.reason) == ("Unknown", "InternalError")
    assert "secret" not in found.message
    assert brief("x (configured timeouts: 1), Timeout: 5s, Topology Description: <…>") == "x"
    assert len(brief("x" * 10_000)) == 200


def test_namespaces_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OperatorSettings().namespaces == ()
    monkeypatch.setenv("OPERATOR_NAMESPACES", "one, two,")
    assert OperatorSettings().namespaces == ("one", "two")
    monkeypatch.setenv("OPERATOR_NAMESPACES", "")
    assert OperatorSettings().namespaces == ()


def test_counters_begin_at_zero() -> None:
    metrics = Metrics(["EventStore"])
    shown = {
        (sample.labels.get("kind"), sample.labels.get("result")): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "indexer_reconciles_total"
    }
    assert shown == {("EventStore", result): 0.0 for result in RESULTS}
