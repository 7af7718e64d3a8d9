"""Projections in Python: routing by name and key, handlers and what they may return, typed payloads, indexes."""

from __future__ import annotations

import dataclasses
import datetime
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from bson.int64 import Int64
from bson.objectid import ObjectId

from projector.projection import DELETE, Event, FoldError, IndexSpec, Projection, ProjectionError, State

if TYPE_CHECKING:
    from collections.abc import Callable


class Confirmed(msgspec.Struct, rename="camel"):
    """A payload."""

    org_group: str
    steps: int = 1


@dataclasses.dataclass
class Measured:
    """A payload, as a dataclass."""

    value: float
    at: datetime.datetime


def happened(name: str = "Happened", **fields: Any) -> Event:
    return {"_id": "e1", "aggregateId": "case-1", "sequenceNo": Int64(1), "eventName": name, "payload": {}} | fields


def test_the_most_specific_handler_alone_is_called() -> None:
    permits = Projection("permits")

    @permits.on("Confirmation of receipt")
    def confirm(state: State, event: Event) -> None:
        state["by"] = event["eventName"]

    @permits.on("*")
    def count(state: State, event: Event) -> None:
        state["others"] = state.get("others", 0) + 1

    assert permits.apply("k", None, happened("Confirmation of receipt")) == {
        "_id": "k",
        "by": "Confirmation of receipt",
    }
    assert permits.apply("k", {"_id": "k", "others": 1}, happened("Else")) == {"_id": "k", "others": 2}
    assert permits.handles("anything")
    assert permits.event_names is None


def test_an_event_without_a_handler_changes_nothing() -> None:
    permits = Projection("permits")
    permits.on("Happened")(lambda state, event: DELETE)
    assert not permits.handles("Else")
    assert permits.event_names == ("Happened",)
    assert permits.apply("k", None, happened("Else")) is None
    assert permits.apply("k", {"_id": "k"}, happened("Else")) == {"_id": "k"}


def returning(value: Any) -> Projection:
    projection = Projection("permits")
    projection.on("Happened")(lambda state, event: value)
    return projection


@pytest.mark.parametrize(
    ("value", "after"),
    [
        (None, {"_id": "k", "a": 1}),
        (DELETE, None),
        ({"b": 2}, {"_id": "k", "b": 2}),
        ({"b": 2, "_id": "k"}, {"_id": "k", "b": 2}),
    ],
)
def test_what_a_handler_returns_is_the_document(value: Any, after: State | None) -> None:
    assert returning(value).apply("k", {"_id": "k", "a": 1}, happened()) == after


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (5, "it returned a int"),
        ([], "it returned a list"),
        ({"_id": "other"}, "changed the document's _id"),
        ({"_mark": 1}, "_mark is the projector's own"),
    ],
)
def test_a_handler_that_returns_something_else_fails_its_event(value: Any, problem: str) -> None:
    with pytest.raises(FoldError, match=problem):
        returning(value).apply("k", None, happened())


def test_a_new_document_starts_with_its_key() -> None:
    assert returning(None).apply("k", None, happened()) == {"_id": "k"}


def test_an_error_of_a_handler_comes_through() -> None:
    projection = Projection("permits")
    projection.on("Happened")(lambda state, event: event["payload"]["missing"])
    with pytest.raises(KeyError, match="missing"):
        projection.apply("k", None, happened())


def test_a_document_never_shares_a_list_with_the_event() -> None:
    projection = Projection("permits")

    @projection.on("Happened")
    def keep(state: State, event: Event) -> None:
        state.setdefault("tags", event["payload"]["tags"]).append("more")

    event = happened(payload={"tags": ["a"]})
    assert projection.apply("k", None, event) == {"_id": "k", "tags": ["a", "more"]}
    assert event["payload"] == {"tags": ["a"]}


def test_a_typed_handler_gets_its_payload_and_perhaps_the_event() -> None:
    permits = Projection("permits")

    @permits.on("Confirmed")
    def confirm(state: State, payload: Confirmed) -> None:
        state["group"] = payload.org_group
        state["steps"] = payload.steps

    @permits.on("Measured")
    def measure(state: State, payload: Measured, event: Event) -> None:
        state["value"] = payload.value
        state["sequenceNo"] = event["sequenceNo"]

    at = datetime.datetime(2011, 10, 11, tzinfo=datetime.UTC)
    confirmed = happened("Confirmed", payload={"orgGroup": "Group 1", "steps": Int64(3), "ignored": ObjectId()})
    assert permits.apply("k", None, confirmed) == {"_id": "k", "group": "Group 1", "steps": 3}
    measured = happened("Measured", payload={"value": 1, "at": at})
    assert permits.apply("k", None, measured) == {"_id": "k", "value": 1.0, "sequenceNo": 1}


@pytest.mark.parametrize(("payload", "problem"), [({}, "orgGroup"), ({"orgGroup": 5}, r"got `int` - at `\$.orgGroup`")])
def test_a_payload_of_another_shape_fails_its_event(payload: dict[str, Any], problem: str) -> None:
    permits = Projection("permits")

    @permits.on("Confirmed")
    def confirm(state: State, payload: Confirmed) -> None: ...

    with pytest.raises(FoldError, match=f"handler of 'Confirmed': the payload is no Confirmed: .*{problem}"):
        permits.apply("k", None, happened("Confirmed", payload=payload))


async def asynchronous(state: State, event: Event) -> None: ...
def too_few(state: State) -> None: ...
def too_many(state: State, event: Event, more: int) -> None: ...
def unknown_type(state: State, payload: Unknown) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("handler", "problem"),
    [
        (asynchronous, "must not be async"),
        (too_few, "must take"),
        (too_many, "must take"),
        (unknown_type, "name 'Unknown' is not defined; import"),
    ],
)
def test_a_handler_that_does_not_fit_is_refused(handler: Callable[..., Any], problem: str) -> None:
    with pytest.raises(ProjectionError, match=f"handler of 'Happened': .*{problem}"):
        Projection("permits").on("Happened")(handler)


@pytest.mark.parametrize("name", ["Happened", "*"])
def test_a_second_handler_of_a_name_is_refused(name: str) -> None:
    projection = Projection("permits")
    projection.on(name)(lambda state, event: None)
    with pytest.raises(ProjectionError, match="has a handler already"):
        projection.on(name)(lambda state, event: None)


def test_an_aggregate_is_the_default_key() -> None:
    projection = Projection("permits")
    assert projection.aggregate_keyed
    assert projection.keys(happened()) == ("case-1",)


@pytest.mark.parametrize(
    ("customer", "keys"),
    [
        ("c-1", ("c-1",)),
        (Int64(7), (7,)),
        (["c-1", "c-2", "c-1"], ("c-1", "c-2")),
        ([], ()),
        (None, ()),
        (..., ()),
    ],
)
def test_a_key_names_one_document_or_several_or_none(customer: Any, keys: tuple[Any, ...]) -> None:
    event = happened(payload={} if customer is ... else {"customerId": customer})
    by_reference = Projection("customers", key="$payload.customerId")
    by_function = Projection("customers", key=lambda event: event["payload"].get("customerId"))
    assert not by_reference.aggregate_keyed
    assert by_reference.keys(event) == by_function.keys(event) == keys


@pytest.mark.parametrize("customer", [True, 1.5, {"a": 1}, [["c-1"]], [None]])
def test_what_cannot_be_a_key_fails_its_event(customer: Any) -> None:
    projection = Projection("customers", key="$payload.customerId")
    with pytest.raises(FoldError, match=r"key: a .* cannot be one"):
        projection.keys(happened(payload={"customerId": customer}))


def test_a_key_through_an_array_of_documents_names_several() -> None:
    projection = Projection("sales", key="$payload.items.productId")
    event = happened(payload={"items": [{"productId": "p-1"}, {"other": 1}, {"productId": "p-2"}]})
    assert projection.keys(event) == ("p-1", "p-2")


def test_the_fields_include_the_keys() -> None:
    projection = Projection(
        "sales", key="$payload.customerId", fields=["payload.items.price", "payload.items", "timestamp"]
    )
    assert projection.fields == ("payload.customerId", "payload.items", "timestamp")
    assert Projection("sales").fields is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"name": "Permits"}, "^name: 'Permits' must be"),
        ({"name": "p" * 64}, "^name: "),
        ({"version": 0}, "^version: 0 must be at least 1"),
        ({"collection": "events"}, "^collection: 'events' .* is the log"),
        ({"collection": "a.b"}, "^collection: "),
        ({"key": "aggregateId"}, "^key: 'aggregateId' must be a reference"),
        ({"key": "$customerId"}, r"^key: .* \(do you mean \$payload.customerId"),
        ({"fields": ["amount"]}, r"^fields: .* \(do you mean \$payload.amount"),
    ],
)
def test_what_cannot_be_a_projection_is_refused(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ProjectionError, match=problem):
        Projection(**({"name": "permits"} | arguments))


def test_a_version_lies_in_a_collection_of_its_own() -> None:
    assert Projection("permits", 3).versioned == "permits.v3"
    assert Projection("permits", 3, collection="Permits").versioned == "Permits.v3"


def test_an_index_keeps_the_order_of_its_keys() -> None:
    index = IndexSpec(
        keys={"status": 1, "at": -1}, unique=True, partial_filter={"status": "open"}, expire_after_seconds=60
    )
    assert index.model().document == {
        "name": "status_1_at_-1",
        "key": {"status": 1, "at": -1},
        "unique": True,
        "partialFilterExpression": {"status": "open"},
        "expireAfterSeconds": 60,
    }
    assert list(index.model().document["key"]) == ["status", "at"]
    assert msgspec.convert(msgspec.to_builtins(index), IndexSpec) == index
