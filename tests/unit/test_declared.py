"""Declared projections: what is refused and where it says the fault is, and what an update means beside its operators.

What the operators do to values is judged by MongoDB: `tests/integration/test_operators_against_mongodb.py`.
"""

from __future__ import annotations

import copy
import datetime
import json
from typing import Any

import pytest
from bson.decimal128 import Decimal128
from bson.int64 import Int64
from hypothesis import given
from hypothesis import strategies as st

from projector.declared import from_definition
from projector.projection import FoldError, Projection, ProjectionError

AT = datetime.datetime(2011, 10, 11, 11, 45, 40, 276_000, tzinfo=datetime.UTC)


def declared(update: dict[str, Any], **fields: Any) -> Projection:
    return from_definition({"name": "permits", "on": {"Happened": update}} | fields)


def happened(payload: dict[str, Any] | None = None, name: str = "Happened") -> dict[str, Any]:
    return {
        "_id": "e1",
        "aggregateId": "case-1",
        "sequenceNo": Int64(4),
        "eventName": name,
        "timestamp": AT,
        "payload": payload or {},
    }


@pytest.mark.parametrize(
    ("update", "problem"),
    [
        ({}, r'on\["Happened"\]: it must have an operator'),
        ({"$set": {}}, r'on\["Happened"\]: it must have an operator'),
        ({"$delete": False}, r'on\["Happened"\]: it must have an operator'),
        ({"$delete": True, "$set": {"a": 1}}, r'on\["Happened"\].\$delete: it must stand alone'),
        ({"$currentDate": {"a": True}}, r'on\["Happened"\]: .*unknown field `\$currentDate`'),
        ({"set": {"a": 1}}, r'on\["Happened"\]: .*unknown field `set`'),
        ({"$set": 5}, r'on\["Happened"\].\$set: Expected `object`, got `int`'),
        ({"$inc": {"steps": "one"}}, r'on\["Happened"\].\$inc.steps: \'one\' must be a number'),
        ({"$inc": {"steps": True}}, r'on\["Happened"\].\$inc.steps: True must be a number'),
        ({"$mul": {"steps": None}}, r'on\["Happened"\].\$mul.steps: None must be a number'),
        ({"$set": {"a": 1, "a.b": 2}}, r"\$set.a.b: 'a.b' is in conflict with .*\$set.a$"),
        ({"$set": {"a.b": 1}, "$inc": {"a": 2}}, r"\$set.a.b: 'a.b' is in conflict with .*\$inc.a$"),
        ({"$set": {"a": 1, "a-b": 1}, "$unset": {"a.c": 1}}, r"\$unset.a.c: 'a.c' is in conflict with .*\$set.a$"),
        ({"$rename": {"a": "b", "b": "c"}}, r"'b' is in conflict"),
        ({"$rename": {"a": "a"}}, r"'a' is in conflict"),
        ({"$rename": {"a": "_mark"}}, r"\$rename.a: the field '_mark' is the projector's own"),
        ({"$set": {"_id": 1}}, r"\$set._id: the field '_id' is the projector's own"),
        ({"$set": {"_mark.x": 1}}, r"the field '_mark' is the projector's own"),
        ({"$set": {"a..b": 1}}, r"\$set.a..b: a path must not have empty parts"),
        ({"$set": {"": 1}}, r"a path must not have empty parts"),
        ({"$set": {"a.$": 1}}, r"positional operators are not supported"),
        ({"$set": {"a.$[]": 1}}, r"positional operators are not supported"),
        ({"$set": {"a": "$org:group"}}, r"an event has no field 'org:group' \(do you mean \$payload.org:group"),
        ({"$set": {"a": {"b": ["$x"]}}}, r"\$set.a.b\[0\]: '\$x': an event has no field"),
        ({"$set": {"a": "$$NOW"}}, r"\$set.a: '\$\$NOW': variables are not supported"),
        ({"$set": {"a": "$timestamp.x"}}, r"timestamp has no fields of its own"),
        ({"$set": {"a": "$payload..x"}}, r"is not a path; write \{\$literal"),
        ({"$set": {"a": {"$add": [1, 2]}}}, r"\$set.a.\$add: expressions are not supported"),
        ({"$set": {"a": {"b.c": 1}}}, r"\$set.a: the field name 'b.c' must not contain a dot"),
        ({"$set": {"a": 2**63}}, r"\$set.a: 9223372036854775808 does not fit into 64 bits"),
        ({"$set": {"a": {"$numberDecimal": "much"}}}, r"\$set.a.\$numberDecimal: "),
        ({"$set": {"a": {"$date": "yesterday"}}}, r"\$set.a.\$date: "),
        ({"$set": {"a": {1, 2}}}, r"\$set.a: a set cannot be a value"),
        ({"$unset": {"a": 5}}, r'\$unset.a: 5 must be "", true or 1'),
        ({"$push": {"a": {"$slice": 1}}}, r"\$push.a: \$slice must stand beside \$each"),
        ({"$push": {"a": {"$each": 1}}}, r"\$push.a.\$each: 1 must be an array or a reference"),
        ({"$push": {"a": {"$each": [], "x": 1}}}, r"\$push.a: 'x' cannot stand here"),
        ({"$push": {"a": {"$each": [], "$sort": 2}}}, r"\$push.a.\$sort: 2 must be 1, -1"),
        ({"$push": {"a": {"$each": [], "$slice": 1.5}}}, r"\$push.a.\$slice: 1.5 must be an integer"),
        ({"$addToSet": {"a": {"$each": [], "$slice": 1}}}, r"\$addToSet.a: '\$slice' cannot stand here"),
        ({"$pull": {"a": {"$gt": 1}}}, r"\$pull.a: '\$gt': a condition is"),
        ({"$pull": {"a": {"b": {"$gt": 1}}}}, r"\$pull.a.b.\$gt: "),
        ({"$pull": {"a": {"b.c": 1}}}, r"\$pull.a: 'b.c': a condition is"),
        ({"$pull": {"a": {"$in": 1}}}, r"\$pull.a.\$in: 1 must be an array or a reference"),
    ],
)
def test_a_wrong_update_is_refused_at_its_place(update: dict[str, Any], problem: str) -> None:
    with pytest.raises(ProjectionError, match=problem) as caught:
        declared(update)
    assert str(caught.value).startswith("permits: on[")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"name": "Permits"}, "^Permits: name: "),
        ({"version": 0}, "^permits: version: Expected `int` >= 1"),
        ({"version": True}, "^permits: version: Expected `int`, got `bool`"),
        ({"on": {}}, "^permits: on: Expected `object` of length >= 1"),
        ({"on": None}, "^permits: on: Expected `object`, got `null`"),
        ({"extra": 1}, "^permits: Object contains unknown field `extra`"),
        ({"readModel": {"key": "aggregateId"}}, "^permits: readModel.key: "),
        ({"readModel": {"key": "$customerId"}}, r"^permits: readModel.key: .*do you mean \$payload.customerId"),
        ({"readModel": {"collection": "events"}}, "^permits: readModel.collection: .* is the log"),
        ({"readModel": {"indexes": [{"keys": {}}]}}, r"^permits: readModel.indexes\[0\].keys: "),
        ({"readModel": {"indexes": [{"keys": {"a": 2}}]}}, r"^permits: readModel.indexes\[0\].keys"),
    ],
)
def test_a_wrong_definition_is_refused_at_its_place(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ProjectionError, match=problem):
        declared({"$inc": {"steps": 1}}, **fields)


@pytest.mark.parametrize("key", [True, "true"])
def test_the_bare_word_on_is_explained(key: Any) -> None:
    with pytest.raises(ProjectionError, match=r"^permits: on: write it in quotes"):
        from_definition({"name": "permits", key: {"Happened": {"$inc": {"steps": 1}}}})


def test_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(ProjectionError, match="must be a mapping, not 'permits'"):
        from_definition("permits")


def test_a_named_event_is_not_counted_under_the_star_too() -> None:
    projection = from_definition(
        {
            "name": "permits",
            "on": {"Happened": {"$inc": {"steps": 1}}, "*": {"$inc": {"steps": 10}}},
        }
    )
    assert projection.apply("k", None, happened()) == {"_id": "k", "steps": 1}
    assert projection.apply("k", {"_id": "k", "steps": 1}, happened(name="Else")) == {"_id": "k", "steps": 11}


def test_references_find_every_field_of_an_event() -> None:
    projection = declared(
        {
            "$set": {
                "event": "$eventId",
                "same": "$_id",
                "aggregate": "$aggregateId",
                "number": "$sequenceNo",
                "name": "$eventName",
                "at": "$timestamp",
                "group": "$payload.org:group",
                "source": "$metadata.source",
                "literal": {"$literal": "$payload.org:group"},
                "amount": {"$numberDecimal": "1.50"},
                "since": {"$date": "2011-10-11T13:45:40.276+02:00"},
            }
        }
    )
    event = happened({"org:group": "Group 1"}) | {"metadata": {"source": "web"}}
    assert projection.apply("k", None, event) == {
        "_id": "k",
        "event": "e1",
        "same": "e1",
        "aggregate": "case-1",
        "number": 4,
        "name": "Happened",
        "at": AT,
        "group": "Group 1",
        "source": "web",
        "literal": "$payload.org:group",
        "amount": Decimal128("1.50"),
        "since": AT,
    }
    assert projection.fields == (
        "_id",
        "aggregateId",
        "eventName",
        "metadata.source",
        "payload.org:group",
        "sequenceNo",
        "timestamp",
    )


@pytest.mark.parametrize(
    "entry",
    [
        {"$set": {"a": "$payload.gone"}},
        {"$set": {"x.y": "$payload.gone"}},
        {"$setOnInsert": {"a": "$payload.gone"}},
        {"$inc": {"a": "$payload.gone"}},
        {"$mul": {"n": "$payload.gone"}},
        {"$min": {"a": "$payload.gone"}},
        {"$max": {"a": "$payload.gone"}},
        {"$push": {"a": "$payload.gone"}},
        {"$push": {"n": {"$each": "$payload.gone"}}},
        {"$addToSet": {"a": "$payload.gone.deeper"}},
        {"$pull": {"items": "$payload.gone"}},
        {"$pull": {"items": {"sku": "$payload.gone"}}},
        {"$pull": {"items": {"sku": {"$in": "$payload.gone"}}}},
        {"$pull": {"items": {"$in": ["$payload.gone"]}}},
    ],
)
def test_an_entry_whose_reference_finds_nothing_does_nothing(entry: dict[str, Any]) -> None:
    before = {"_id": "k", "a": [1], "items": [{"sku": "s"}, {}, None]}
    projection = declared(entry | {"$rename": {"nothing": "here"}})
    assert projection.apply("k", copy.deepcopy(before), happened()) == before
    assert projection.apply("k", None, happened()) == {"_id": "k"}


def test_null_is_a_value() -> None:
    assert declared({"$set": {"a": "$payload.x"}}).apply("k", {"_id": "k", "a": 1}, happened({"x": None})) == {
        "_id": "k",
        "a": None,
    }
    with pytest.raises(FoldError, match=r'on\["Happened"\].\$inc.a: \$inc by needs a number, not null'):
        declared({"$inc": {"a": "$payload.x"}}).apply("k", None, happened({"x": None}))


def test_a_deleted_document_can_come_back() -> None:
    projection = from_definition(
        {
            "name": "permits",
            "on": {"Opened": {"$setOnInsert": {"first": "$payload.n"}, "$inc": {"n": 1}}, "Closed": {"$delete": True}},
        }
    )
    state = None
    for number in (1, 2):
        state = projection.apply("k", state, happened({"n": number}, "Opened"))
    assert state == {"_id": "k", "first": 1, "n": 2}
    state = projection.apply("k", state, happened(name="Closed"))
    assert state is None
    assert projection.apply("k", state, happened(name="Closed")) is None
    assert projection.apply("k", state, happened({"n": 3}, "Opened")) == {"_id": "k", "first": 3, "n": 1}


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(value=JSON, literal=JSON)
def test_documents_share_nothing_with_events_definitions_or_each_other(value: Any, literal: Any) -> None:
    definition = {
        "name": "permits",
        "on": {
            "Happened": {
                "$set": {"value": "$payload.value", "literal": {"$literal": literal}, "mixed": ["$payload.value", [1]]},
                "$push": {"pushed": "$payload.value", "each": {"$each": ["$payload.value", {"a": [1]}]}},
                "$addToSet": {"set": "$payload"},
            }
        },
    }
    event = happened({"value": value})
    kept = copy.deepcopy((definition, event))
    projection = from_definition(definition)
    states = [projection.apply(key, None, event) for key in (1, 2)]
    seen: set[int] = set()
    for container in _containers([event, definition, projection.definition, *states]):
        assert id(container) not in seen
        seen.add(id(container))
    assert (definition, event) == kept


def _containers(value: Any) -> list[Any]:
    if not isinstance(value, dict | list):
        return []
    below = value.values() if isinstance(value, dict) else value
    return [value, *(found for item in below for found in _containers(item))]


def test_a_definition_survives_json_and_gives_the_same_projection() -> None:
    first = declared(
        {
            "$set": {"since": {"$date": "2020-01-01T00:00:00Z"}, "a": "$payload.a"},
            "$push": {"b": {"$each": ["$payload.b"]}},
        },
        version=3,
        readModel={"key": "$payload.c", "indexes": [{"keys": {"a": 1, "b": -1}, "expireAfterSeconds": 5}]},
    )
    assert first.definition is not None
    again = from_definition(json.loads(json.dumps(first.definition)))
    assert again.definition == first.definition
    assert (again.name, again.version, again.versioned) == ("permits", 3, "permits.v3")
    assert again.indexes == first.indexes
    assert again.fields == ("payload.a", "payload.b", "payload.c")
    event = happened({"a": 1, "b": 2, "c": 3})
    assert again.keys(event) == (3,)
    assert again.apply(3, None, event) == first.apply(3, None, event)
