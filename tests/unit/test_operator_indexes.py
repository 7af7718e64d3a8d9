"""Plans for indexes against a model of the server: they converge, and touch nothing that is not theirs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from projector.operator.indexes import Action, Found, Index, Step, plan

PLAIN = Index("i", (("a", 1),))


class Server:
    """What a mongod allows: one index of a name, and one of keys, unique, sparse, partial filter and collation."""

    def __init__(self, *indexes: Index) -> None:
        self.indexes: dict[str, Index] = {}
        for index in indexes:
            self.create(index)

    def create(self, index: Index) -> None:
        assert index.name not in self.indexes, "86"
        assert identity(index) not in map(identity, self.indexes.values()), "85"
        self.indexes[index.name] = index

    def modify(self, index: Index) -> None:
        before = self.indexes[index.name]
        assert replace(before, hidden=False, unique=False, expire_after_seconds=None) == replace(
            index, hidden=False, unique=False, expire_after_seconds=None
        )
        assert not (before.unique and not index.unique)
        assert not (before.expire_after_seconds is not None and index.expire_after_seconds is None)
        self.indexes[index.name] = index

    def carry_out(self, step: Step) -> None:
        for name in step.leftovers:
            del self.indexes[name]
        match step.action:
            case Action.CREATE | Action.BESIDE:
                self.create(step.wanted)
            case Action.INSTEAD:
                assert step.found is not None
                del self.indexes[step.found.index.name]
                self.create(step.wanted)
            case Action.MODIFY:
                self.modify(step.wanted)

    @property
    def found(self) -> list[Found]:
        return [Found(index) for index in self.indexes.values()]


def identity(index: Index) -> tuple[Any, ...]:
    return index.keys, index.unique, index.sparse, str(index.partial_filter), str(index.collation)


def indexes(names: str = "abc") -> st.SearchStrategy[Index]:
    """Indexes over few fields, so that they often collide."""
    return st.builds(
        Index,
        name=st.sampled_from(names),
        keys=st.lists(
            st.tuples(st.sampled_from("xy"), st.sampled_from([1, -1])),
            min_size=1,
            max_size=2,
            unique_by=lambda key: key[0],
        ).map(tuple),
        unique=st.booleans(),
        sparse=st.booleans(),
        hidden=st.booleans(),
        expire_after_seconds=st.sampled_from([None, 60, 90]),
    )


def distinct(found: list[Index]) -> bool:
    return len({index.name for index in found}) == len({identity(index) for index in found}) == len(found)


sets = st.lists(indexes(), max_size=3).filter(distinct)


@settings(max_examples=400)
@given(histories=st.lists(sets, min_size=1, max_size=5))
def test_any_change_of_a_spec_is_reached_where_recreating_is_allowed(histories: list[list[Index]]) -> None:
    """But for two that change places: each stands in the other's way, and that is said."""
    server = Server()
    owned: set[str] = set()
    for wanted in histories:
        owned |= {index.name for index in wanted}
        for name in set(server.indexes) - owned:
            del server.indexes[name]
        for _ in range(6 * len(wanted) + 1):
            steps = plan(wanted, server.found, owned, recreate=True)
            idle = {Action.KEEP, Action.TAKEN}
            step = next((one for one in steps if one.action not in idle or one.leftovers), None)
            if step is None:
                break
            owned.add(step.wanted.name)
            server.carry_out(step)  # one at a time, as each changes what the next one finds
        else:
            pytest.fail(f"it never settles: {steps}")
        for step in steps:
            if step.action is Action.TAKEN:
                assert step.found is not None
                assert step.found.index.name in owned
                assert not set(step.wanted.differences(step.found.index)) - {"hidden", "expireAfterSeconds"}
            else:
                assert step.wanted.differences(server.indexes[step.wanted.name]) == ()


@given(wanted=sets, theirs=st.lists(indexes("pqr"), max_size=3).filter(distinct), recreate=st.booleans())
def test_nothing_foreign_is_touched(wanted: list[Index], theirs: list[Index], *, recreate: bool) -> None:
    server = Server(*theirs)
    before = dict(server.indexes)
    for _ in range(4):
        for step in plan(wanted, server.found, {index.name for index in wanted}, recreate=recreate):
            if step.action is not Action.CREATE or not any(
                identity(step.wanted) == identity(index) for index in server.indexes.values()
            ):
                server.carry_out(step)
    assert {name: index for name, index in server.indexes.items() if name in before} == before


@given(wanted=indexes("a"), there=indexes("a"))
def test_without_leave_nothing_is_dropped_or_built_anew(wanted: Index, there: Index) -> None:
    [step] = plan([wanted], [Found(there)], {"a"})
    assert step.action in {Action.KEEP, Action.MODIFY, Action.DRIFTED}
    assert step.leftovers == ()
    assert (step.action is Action.KEEP) == (wanted == there)


@given(index=indexes())
def test_a_document_comes_back_as_the_index(index: Index) -> None:
    assert Index.from_document({"v": 2} | index.document()) == index
    assert index.differences(Index.from_document(index.document())) == ()


@given(one=indexes("a"), other=indexes("a"))
def test_the_digest_tells_indexes_apart(one: Index, other: Index) -> None:
    assert (one.digest() == other.digest()) == (one == other)
    assert replace(one, name="b").digest() == one.digest()


@pytest.mark.parametrize(
    ("wanted", "document"),
    [
        (PLAIN, {"key": {"a": 1.0}}),
        (PLAIN, {"key": {"a": 1}, "collation": {"locale": "simple"}}),
        (
            replace(PLAIN, partial_filter={"n": {"$gt": 1}, "b": True}),
            {"key": {"a": 1}, "partialFilterExpression": {"b": True, "n": {"$gt": 1.0}}},
        ),
        (replace(PLAIN, expire_after_seconds=60), {"key": {"a": 1}, "expireAfterSeconds": 60.0}),
        (
            replace(PLAIN, collation={"locale": "en"}),
            {
                "key": {"a": 1},
                "collation": {
                    "locale": "en",
                    "strength": 3,
                    "caseLevel": False,
                    "numericOrdering": False,
                    "version": "57.1",
                },
            },
        ),
        (
            Index("i", (("a", 1), ("t", "text"), ("u", "text"))),
            {"key": {"a": 1, "_fts": "text", "_ftsx": 1}, "weights": {"u": 1, "t": 1}, "default_language": "english"},
        ),
    ],
    ids=str,
)
def test_two_ways_to_write_one_index(wanted: Index, document: dict[str, Any]) -> None:
    assert wanted.differences(Index.from_document({"name": "i"} | document)) == ()


@pytest.mark.parametrize(
    ("document", "differing"),
    [
        ({"key": {"a": -1}}, ("keys",)),
        ({"key": {"a": 1, "b": 1}}, ("keys",)),
        ({"key": {"a": 1}, "unique": True, "sparse": True}, ("unique", "sparse")),
        ({"key": {"a": 1}, "partialFilterExpression": {"b": 1}}, ("partialFilterExpression",)),
        ({"key": {"a": 1}, "collation": {"locale": "en"}}, ("collation",)),
        ({"key": {"a": 1}, "hidden": True, "expireAfterSeconds": 0}, ("hidden", "expireAfterSeconds")),
    ],
    ids=str,
)
def test_what_differs_is_named(document: dict[str, Any], differing: tuple[str, ...]) -> None:
    assert PLAIN.differences(Index.from_document({"name": "i"} | document)) == differing


def test_true_is_not_one() -> None:
    one = replace(PLAIN, partial_filter={"b": 1})
    assert one.differences(replace(PLAIN, partial_filter={"b": True})) == ("partialFilterExpression",)
    assert one.digest() != replace(PLAIN, partial_filter={"b": True}).digest()


def test_a_build_is_joined_or_waited_for() -> None:
    building = Found(PLAIN, build="1")
    [step] = plan([PLAIN], [building], {"i"})
    assert (step.action, step.found) == (Action.WAIT, building)
    [step] = plan([replace(PLAIN, sparse=True)], [building], {"i"}, recreate=True)
    assert (step.action, step.wanted) == (Action.WAIT, PLAIN)


def test_a_name_that_looks_like_a_replacement_but_is_wanted_by_itself() -> None:
    other = Index("i-0a1b2c3d", (("b", 1),))
    steps = plan([PLAIN, other], [Found(other)], {"i", other.name}, recreate=True)
    assert [step.action for step in steps] == [Action.CREATE, Action.KEEP]
    assert all(not step.leftovers for step in steps)
