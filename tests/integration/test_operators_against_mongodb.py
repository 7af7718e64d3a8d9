"""MongoDB is the judge of the update vocabulary: the same documents and updates go to a real server and to the fold.

What is compared is the BSON of the whole document: values, their types, the order of the fields. Where the server raises
an error the fold must raise FoldError (or the definition be refused), and nowhere else.
"""

from __future__ import annotations

import datetime
import uuid
from typing import TYPE_CHECKING, Any

import bson
import pytest
from bson.binary import Binary
from bson.decimal128 import Decimal128
from bson.int64 import Int64
from bson.objectid import ObjectId
from bson.timestamp import Timestamp
from hypothesis import event as note
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pymongo import MongoClient, ReturnDocument
from pymongo.errors import OperationFailure

from eventstore.client import CODEC
from projector.declared import from_definition
from projector.expressions import compile_value
from projector.paths import MISSING, minimal
from projector.projection import FoldError, ProjectionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pymongo.collection import Collection
    from pymongo.database import Database

NUMBERS: st.SearchStrategy[Any] = st.one_of(
    st.integers(-3, 3),
    st.integers(-3, 3).map(Int64),
    st.sampled_from([2**31 - 1, -(2**31), 2**31, 2**53 + 1, 2**62, 2**63 - 1, -(2**63)]),
    st.sampled_from(
        [0.0, -0.0, 1.0, -1.5, 0.1, 1 / 3, 2.0**53, 2.0**63, 1e300, float("nan"), float("inf"), -float("inf")]
    ),
    st.sampled_from(["0", "-0", "1", "1.0", "1.50", "-2", "1E+3", "9.999E+6144", "1E-6176", "NaN", "Infinity"]).map(
        Decimal128
    ),
)
OTHERS: st.SearchStrategy[Any] = st.sampled_from(
    [
        None,
        False,
        True,
        "",
        "a",
        "b",
        "é",
        "😀",
        datetime.datetime(1969, 12, 31, tzinfo=datetime.UTC),
        datetime.datetime(2011, 10, 11, 11, 45, 40, 276_000, tzinfo=datetime.UTC),
        ObjectId("6a0000000000000000000001"),
        ObjectId("6a0000000000000000000002"),
        b"a",
        b"bb",
        Binary(b"a", 5),
        Timestamp(1, 2),
    ]
)
SCALARS = NUMBERS | OTHERS
NAMES = st.sampled_from(["a", "b", "c", "0", "1"])
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
TARGETS = st.sampled_from(["a", "b", "c", "d"])
DOCUMENTS = st.dictionaries(TARGETS, VALUES | NUMBERS | st.lists(VALUES, max_size=4), max_size=4)
PATHS = st.one_of(
    TARGETS,
    st.tuples(TARGETS, st.sampled_from(["a", "b", "c", "0", "1", "3", "10"])).map(".".join),
    st.tuples(TARGETS, NAMES, NAMES).map(".".join),
)
SORTS: st.SearchStrategy[Any] = st.sampled_from([1, -1]) | st.dictionaries(
    st.sampled_from(["a", "b", "a.b", "a.0", "0.a"]), st.sampled_from([1, -1]), min_size=1, max_size=2
)


@st.composite
def pushes(draw: st.DrawFn) -> tuple[Any, Any]:
    """`$push` with modifiers, for the definition and for the server."""
    each = draw(st.lists(VALUES, max_size=3))
    rest = draw(
        st.fixed_dictionaries(
            {}, optional={"$position": st.integers(-3, 4), "$sort": SORTS, "$slice": st.integers(-4, 4)}
        )
    )
    return {"$each": [{"$literal": value} for value in each], **rest}, {"$each": each, **rest}


def both(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, Any]]:
    """A literal, for the definition and for the server."""
    return values.map(lambda value: ({"$literal": value}, value))


EACH = st.lists(VALUES, max_size=4).map(lambda values: ({"$each": {"$literal": values}}, {"$each": values}))
PULLS = st.one_of(
    both(VALUES),
    st.lists(SCALARS, max_size=3).map(
        lambda values: ({"$in": [{"$literal": value} for value in values]}, {"$in": values})
    ),
    st.dictionaries(NAMES, SCALARS, max_size=2).map(lambda d: ({name: {"$literal": v} for name, v in d.items()}, d)),
    st.tuples(NAMES, st.lists(SCALARS, max_size=2))
    .map(lambda pair: ({pair[0]: {"$in": {"$literal": pair[1]}}}, {pair[0]: {"$in": pair[1]}}))
    .filter(lambda pair: isinstance(pair[0], dict)),
)
OPERATIONS: dict[str, st.SearchStrategy[tuple[Any, Any]]] = {
    "$set": both(VALUES),
    "$setOnInsert": both(VALUES),
    "$unset": st.just(("", "")),
    "$inc": both(NUMBERS | VALUES),
    "$mul": both(NUMBERS | VALUES),
    "$min": both(VALUES),
    "$max": both(VALUES),
    "$push": both(VALUES) | pushes(),
    "$addToSet": both(VALUES) | EACH,
    "$pull": PULLS,
    "$rename": PATHS.map(lambda path: (path, path)),
}


@st.composite
def updates(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """An update of one to four entries, as a definition spells it and as the server does."""
    declared: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3, 4]))):
        operator = draw(st.sampled_from(list(OPERATIONS)))
        path = draw(PATHS)
        ours, theirs = draw(OPERATIONS[operator])
        declared.setdefault(operator, {})[path] = ours
        plain.setdefault(operator, {})[path] = theirs
    return declared, plain


@pytest.fixture(scope="module")
def server(mongodb_uri: str) -> Iterator[Database[dict[str, Any]]]:
    with MongoClient[dict[str, Any]](mongodb_uri, w=1) as client:
        database = client.get_database(f"test_operators_{uuid.uuid4().hex[:12]}", codec_options=CODEC)
        yield database
        client.drop_database(database)


@pytest.fixture(scope="module")
def collection(server: Database[dict[str, Any]]) -> Collection[dict[str, Any]]:
    return server["documents"]


def stored(document: dict[str, Any]) -> dict[str, Any]:
    """The document as it comes back from MongoDB: int64 as Int64, and so on."""
    return bson.decode(bson.encode(document), CODEC)


def judged(collection: Collection[dict[str, Any]], document: dict[str, Any] | None, update: dict[str, Any]) -> Any:
    """The document after the update on the server, or its error."""
    collection.delete_many({})
    if document is not None:
        collection.insert_one(dict(document))
    try:
        return collection.find_one_and_update({"_id": 1}, update, upsert=True, return_document=ReturnDocument.AFTER)
    except OperationFailure as error:
        return error


def folded(state: dict[str, Any] | None, declared: dict[str, Any]) -> Any:
    """The document after the declared update, or its error."""
    try:
        projection = from_definition({"name": "judged", "on": {"happened": declared}})
        return projection.apply(1, state, {"eventName": "happened"})
    except (FoldError, ProjectionError) as error:
        return error


def same(update: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """An update that a definition and the server spell in the same way."""
    return [(update, update)]


@settings(max_examples=2_500, deadline=None)
@given(document=st.none() | DOCUMENTS, steps=st.lists(updates(), min_size=1, max_size=2))
@example(document={"a": 2**31 - 1}, steps=same({"$inc": {"a": 1}}))
@example(document={"a": 2**63 - 1}, steps=same({"$inc": {"a": 1}}))
@example(document={"a": 0.0}, steps=same({"$mul": {"a": -1}}))
@example(document={"a": Decimal128("1.0")}, steps=same({"$inc": {"a": 0}}))
@example(document={"a": -0.0}, steps=same({"$mul": {"a": Decimal128("2")}}))
@example(document={"a": [[{"a": 0}], []]}, steps=same({"$push": {"a": {"$each": [], "$sort": {"0.a": 1}}}}))
@example(document={"a": []}, steps=same({"$set": {"a.1500001": 1}}))
@example(document={"a": []}, steps=same({"$set": {"a.99999999999": 1}}))
@example(document={"a": 1}, steps=same({"$set": {"a": 1, "a.b": 2}}))
@example(document={}, steps=same({"$set": {"b": 1, "a": 2, "10": 3, "9": 4}}))
@example(document={"a": 1}, steps=same({"$rename": {"a": "c"}, "$set": {"b": 1, "d": 1}}))
def test_an_update_does_what_mongodb_does(
    collection: Collection[dict[str, Any]],
    document: dict[str, Any] | None,
    steps: list[tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    state = None if document is None else stored({"_id": 1, **document})
    for declared, plain in steps:
        expected = judged(collection, state, plain)
        result = folded(state, declared)
        if isinstance(expected, OperationFailure) or isinstance(result, Exception):
            assert isinstance(expected, OperationFailure), f"{result}, but the server: {expected}"
            assert isinstance(result, Exception), f"{result}, but the server: {expected}"
            note(f"refused: {type(result).__name__}")
            return
        assert bson.encode(result) == bson.encode(expected), f"{result} is not {expected}"
        state = result
    note("applied")


@settings(max_examples=400, deadline=None)
@given(values=st.lists(VALUES, max_size=12), direction=st.sampled_from([1, -1]))
def test_values_are_ordered_as_mongodb_orders_them(
    collection: Collection[dict[str, Any]], values: list[Any], direction: int
) -> None:
    update = {"$push": {"a": {"$each": [], "$sort": direction}}}
    expected = judged(collection, {"_id": 1, "a": values}, update)
    projection = from_definition({"name": "judged", "on": {"happened": update}})
    state = projection.apply(1, stored({"_id": 1, "a": values}), {"eventName": "happened"})
    assert state is not None
    assert bson.encode(state) == bson.encode(expected)


EVENT_NAMES = st.sampled_from(["a", "b", "org:group", "0"])
PAYLOADS = st.dictionaries(
    EVENT_NAMES,
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(EVENT_NAMES, inner, max_size=3),
        max_leaves=10,
    ),
    max_size=3,
)
REFERENCES = st.one_of(
    st.sampled_from(["$aggregateId", "$sequenceNo", "$eventName", "$timestamp", "$_id", "$metadata.a", "$payload"]),
    st.lists(EVENT_NAMES, min_size=1, max_size=3).map(lambda parts: ".".join(["$payload", *parts])),
)
EXPRESSIONS: st.SearchStrategy[Any] = st.recursive(
    REFERENCES | VALUES.map(lambda value: {"$literal": value}) | st.sampled_from([1, "text", True, None]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(EVENT_NAMES, inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=1_000, deadline=None)
@given(payload=PAYLOADS, expression=EXPRESSIONS)
def test_a_value_is_what_the_aggregation_language_makes_of_it(
    server: Database[dict[str, Any]], payload: dict[str, Any], expression: Any
) -> None:
    event = stored(
        {
            "_id": "e1",
            "aggregateId": "case-1",
            "sequenceNo": Int64(1),
            "eventName": "happened",
            "timestamp": datetime.datetime(2011, 10, 11, tzinfo=datetime.UTC),
            "payload": payload,
        }
    )
    compiled = compile_value(expression, "value")
    [expected, projected] = server.aggregate(
        [
            {"$documents": {"$literal": [event]}},
            {
                "$facet": {
                    "value": [{"$replaceWith": {"value": expression}}],
                    "event": [{"$project": dict.fromkeys([*minimal(compiled.references), "eventName"], 1)}],
                }
            },
            {"$project": {"both": {"$concatArrays": ["$value", "$event"]}}},
            {"$unwind": "$both"},
            {"$replaceWith": "$both"},
        ]
    )
    value = compiled.get(event)
    ours = {} if value is MISSING else {"value": value}
    assert bson.encode(ours) == bson.encode(expected)
    # The fields that the projection asks for are all that it needs.
    again = compiled.get(projected)
    assert bson.encode({} if again is MISSING else {"value": again}) == bson.encode(ours)
