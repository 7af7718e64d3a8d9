"""The custom resource definitions on a real API server: each rule with an object that it refuses and one that it lets through."""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import pytest

from projector.operator.crds import KINDS, structural
from tests.integration.operator.cluster import ApiError

if TYPE_CHECKING:
    from tests.integration.operator.cluster import Resources

ON = {"Opened": {"$set": {"status": "open"}}}
LOG_INDEX = {"name": "by-name", "keys": [{"field": "eventName"}]}
STORE: dict[str, Any] = {"database": "shop", "indexes": [LOG_INDEX]}
INDEX = {"keys": [{"field": "status", "order": 1}]}
PROJECTION: dict[str, Any] = {"version": 3, "on": ON, "readModel": {"collection": "orders", "indexes": [INDEX]}}

Change = dict[str, Any]


def changed(base: dict[str, Any], change: Change) -> dict[str, Any]:
    """The base with values put at dotted paths; None takes one away."""
    result = copy.deepcopy(base)
    for path, value in change.items():
        *parents, last = path.split("/")
        target: Any = result
        for part in parents:
            target = target[int(part)] if isinstance(target, list) else target.setdefault(part, {})
        if value is None:
            target.pop(last, None)
        elif isinstance(target, list):
            target[int(last)] = value
        else:
            target[last] = value
    return result


CREATED = [
    # kind, refused, its message, let through
    ("EventStore", {"database": "admin"}, "MongoDB keeps this database for itself", {"database": "admins"}),
    ("EventStore", {"database": "a.b"}, "should match", {"database": "a-b"}),
    ("EventStore", {"database": ""}, "at least 1 chars", {"database": "a"}),
    ("EventStore", {"database": "x" * 64}, "may not be more than 63", {"database": "x" * 63}),
    ("EventStore", {"connection": {}}, "Required value", {"connection": {"secretRef": {"name": "mongodb"}}}),
    ("EventStore", {"deletionPolicy": "Drop"}, "Unsupported value", {"deletionPolicy": "Delete"}),
    ("EventStore", {"indexes/0/name": "_id_"}, "belongs to the log itself", {"indexes/0/name": "_id"}),
    (
        "EventStore",
        {"indexes/0/name": "aggregate_sequence"},
        "belongs to the log itself",
        {"indexes/0/name": "sequence"},
    ),
    ("EventStore", {"indexes/0/name": "$x"}, "should match", {"indexes/0/name": "x-1_y.z"}),
    ("EventStore", {"indexes/0/keys": []}, "at least 1 items", {"indexes/0/keys": [{"field": "a"}]}),
    ("EventStore", {"indexes": [LOG_INDEX, LOG_INDEX]}, "Duplicate value", {"indexes": [LOG_INDEX]}),
    ("EventStore", {"indexes/0/unique": True}, "unknown field", {"indexes/0/hidden": True}),
    ("EventStore", {"indexes/0/expireAfterSeconds": 1}, "unknown field", {"indexes/0/sparse": True}),
    (
        "EventStore",
        {"indexes/0/keys": [{"field": "a"}, {"field": "a"}]},
        "Duplicate value",
        {"indexes/0/keys": [{"field": "a"}, {"field": "b"}]},
    ),
    ("EventStore", {"indexes/0/keys/0/order": 2}, "order must be 1, -1", {"indexes/0/keys/0/order": -1}),
    ("EventStore", {"indexes/0/keys/0/order": "2d"}, "order must be 1, -1", {"indexes/0/keys/0/order": "hashed"}),
    ("EventStore", {"indexes/0/keys/0/field": "$a"}, "must not begin with $", {"indexes/0/keys/0/field": "payload.a"}),
    (
        "EventStore",
        {"indexes/0/sparse": True, "indexes/0/partialFilter": {"a": 1}},
        "either sparse or has a partialFilter",
        {"indexes/0/sparse": False, "indexes/0/partialFilter": {"a": {"$gt": 1}}},
    ),
    (
        "EventStore",
        {"indexes/0/collation": {"strength": 2}},
        "Required value",
        {"indexes/0/collation": {"locale": "en"}},
    ),
    (
        "EventStore",
        {"indexes/0/collation": {"locale": "en", "strength": 6}},
        "less than or equal to 5",
        {"indexes/0/collation": {"locale": "en", "strength": 2}},
    ),
    ("Projection", {"on": None}, "write its key in quotes", {"on": ON}),
    ("Projection", {"on": None, "true": ON}, "write its key in quotes", {}),
    ("Projection", {"on": {}}, "at least 1 properties", {"on": {"*": {"$inc": {"n": 1}}}}),
    ("Projection", {"version": None}, "Required value", {"version": 1}),
    ("Projection", {"version": 0}, "greater than or equal to 1", {"version": 1}),
    ("Projection", {"partitions": 0}, "greater than or equal to 1", {"partitions": 1}),
    ("Projection", {"partitions": 65}, "less than or equal to 64", {"partitions": 64}),
    ("Projection", {"rebuild": {"cutover": "Never"}}, "Unsupported value", {"rebuild": {"cutover": "Manual"}}),
    ("Projection", {"readModel/collection": "events"}, "`events` is the log", {"readModel/collection": "event"}),
    ("Projection", {"readModel/collection": "a.b"}, "should match", {"readModel/collection": "a-b"}),
    ("Projection", {"readModel/key": "aggregateId"}, "should match", {"readModel/key": "$payload.customerId"}),
    (
        "Projection",
        {"readModel/indexes/0/name": "_id_"},
        "belongs to MongoDB itself",
        {"readModel/indexes/0/name": "x"},
    ),
    (
        "Projection",
        {"readModel/indexes": [INDEX | {"name": "x"}, {"name": "x", "keys": [{"field": "a"}]}]},
        "two indexes have one name",
        {"readModel/indexes": [INDEX | {"name": "x"}, {"name": "y", "keys": [{"field": "a"}]}]},
    ),
    (
        "Projection",
        {"readModel/indexes/0": {"keys": [{"field": "a"}, {"field": "b"}], "expireAfterSeconds": 60}},
        "expires documents has one field",
        {"readModel/indexes/0": {"keys": [{"field": "a"}], "expireAfterSeconds": 60}},
    ),
    (
        "Projection",
        {"readModel/indexes/0/expireAfterSeconds": -1},
        "greater than or equal to 0",
        {"readModel/indexes/0/expireAfterSeconds": 0},
    ),
    (
        "Projection",
        {"readModel/indexes/0": {"keys": [{"field": "a", "order": "hashed"}], "unique": True}},
        "a unique index has no",
        {"readModel/indexes/0": {"keys": [{"field": "a", "order": -1}], "unique": True}},
    ),
    (
        "Projection",
        {"readModel/indexes/0": {"keys": [{"field": "a"}], "sparse": True, "partialFilter": {"a": 1}}},
        "either sparse or has a partialFilter",
        {"readModel/indexes/0": {"keys": [{"field": "a"}], "sparse": True}},
    ),
    (
        "Projection",
        {"readModel/indexes/0": {"keys": {"status": 1}}},
        "unknown field",
        {"readModel/indexes/0": {"keys": [{"field": "status"}]}},
    ),
    ("Projection", {"indexes": []}, "unknown field", {"paused": True}),
    ("Projection", {"eventStoreRef": {}}, "Required value", {"eventStoreRef": {"name": "main"}}),
]


@pytest.mark.parametrize(("kind", "refused", "message", "accepted"), CREATED, ids=lambda value: str(value)[:60])
async def test_what_may_be_created(
    resources: Resources, kind: str, refused: Change, message: str, accepted: Change
) -> None:
    base = STORE if kind == "EventStore" else PROJECTION
    with pytest.raises(ApiError, match=re.escape(message)) as caught:
        await resources.create(kind, "orders", changed(base, refused), dry_run=True)
    assert caught.value.status in {400, 422}
    await resources.create(kind, "orders", changed(base, accepted), dry_run=True)


UPDATED = [
    ("EventStore", {"database": "other"}, "database is immutable", {"validator": False}),
    ("Projection", {"version": 2}, "version must not decrease", {"version": 4}),
    (
        "Projection",
        {"readModel": {"key": "$payload.customerId"}},
        "another key needs a higher version",
        {"readModel": {"key": "$payload.customerId"}, "version": 4},
    ),
    ("Projection", {"readModel": {"collection": "others"}}, "collection is immutable", {"paused": True}),
    ("Projection", {"readModel": {"collection": None}}, "collection is immutable", {"readModel": {"indexes": []}}),
    ("Projection", {"eventStoreRef": {"name": "main"}}, "eventStoreRef is immutable", {"partitions": 2}),
]


@pytest.mark.parametrize(("kind", "refused", "message", "accepted"), UPDATED, ids=lambda value: str(value)[:60])
async def test_what_may_be_changed(
    resources: Resources, kind: str, refused: Change, message: str, accepted: Change
) -> None:
    await resources.create(kind, "orders", STORE if kind == "EventStore" else PROJECTION)
    with pytest.raises(ApiError, match=message) as caught:
        await resources.patch(kind, "orders", {"spec": refused})
    assert caught.value.status == 422
    await resources.patch(kind, "orders", {"spec": accepted})


@pytest.mark.parametrize(
    ("refused", "accepted"), [("Orders", "orders"), ("1orders", "orders1"), ("a.b", "a-b"), ("x" * 64, "x" * 63)]
)
async def test_the_name_of_a_projection(resources: Resources, refused: str, accepted: str) -> None:
    with pytest.raises(ApiError):
        await resources.create("Projection", refused, PROJECTION, dry_run=True)
    await resources.create("Projection", accepted, PROJECTION, dry_run=True)


def rules(schema: dict[str, Any]) -> list[str]:
    """All messages of CEL rules in a schema."""
    found = [rule["message"] for rule in schema.get("x-kubernetes-validations", [])]
    for part in [*schema.get("properties", {}).values(), *([schema["items"]] if "items" in schema else [])]:
        found += rules(part)
    return found


def test_each_rule_is_among_the_cases() -> None:
    cases = " | ".join(message for _, _, message, _ in [*CREATED, *UPDATED])
    for kind in KINDS:
        for message in rules(structural(kind.spec)):
            assert any(part in message for part in cases.split(" | ")), message


async def test_defaults_are_filled_in_and_shown(resources: Resources) -> None:
    made = await resources.create("Projection", "orders", {"version": 1, "on": ON})
    assert made["spec"] == {
        "version": 1,
        "on": ON,
        "partitions": 1,
        "paused": False,
        "readModel": {"key": "$aggregateId", "indexes": []},
        "rebuild": {"cutover": "Automatic"},
        "allowRecreate": False,
        "deletionPolicy": "Retain",
    }
    store = await resources.create("EventStore", "main", {})
    assert store["spec"]["database"] == "eventstore"
    assert store["spec"]["validator"] is True


async def test_columns(resources: Resources) -> None:
    headers = {"Accept": "application/json;as=Table;v=v1;g=meta.k8s.io"}
    shown = {}
    for kind in ("EventStore", "Projection"):
        url = f"{resources.api.server}{resources.path(kind)}"
        async with resources.api.session.get(url, headers=headers) as response:
            table = await response.json()
        shown[kind] = [column["name"] for column in table["columnDefinitions"]]
    assert shown["Projection"] == ["Name", "Ready", "Reason", "Lag", "Parked", "Version", "Age"]
    assert shown["EventStore"] == ["Name", "Ready", "Reason", "Indexes", "Database", "Age"]


async def test_the_status_is_a_subresource(resources: Resources) -> None:
    made = await resources.create("Projection", "orders", PROJECTION)
    await resources.patch("Projection", "orders", {"status": {"version": 9}})
    found = await resources.get("Projection", "orders")
    assert "status" not in found
    assert found["metadata"]["generation"] == made["metadata"]["generation"]
