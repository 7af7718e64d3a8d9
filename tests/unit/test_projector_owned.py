"""What a folder hands to the writer: whatever was encoded ahead, each document once, and right whether MongoDB has it or not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bson
from hypothesis import given
from hypothesis import strategies as st

from projector.build import Build
from projector.owned import MARK, OwnedChanges, OwnedFolder, _Entry
from projector.projection import DELETE, Projection

if TYPE_CHECKING:
    from projector.changes import Failure

NAMES = ("a", "b", "c")


def _projection() -> Projection:
    projection = Projection("ledger")

    @projection.on("counted")
    def _(state: dict[str, Any], event: dict[str, Any]) -> None:
        state["last"] = int(event["sequenceNo"])

    @projection.on("spoilt")
    def _(state: dict[str, Any], event: dict[str, Any]) -> None:
        state["last"] = 1 << 70  # no integer of BSON

    @projection.on("closed")
    def _(state: dict[str, Any], event: dict[str, Any]) -> Any:
        return DELETE

    return projection


class _Model:
    """The read model: applies what a transaction would, and refuses what MongoDB refuses."""

    def __init__(self) -> None:
        self.documents: dict[str, dict[str, Any]] = {}
        self.marks: dict[str, int] = {}

    def apply(self, changes: OwnedChanges) -> None:
        writes = changes._writes
        touched = [*writes.inserts.authors, *writes.replaces.authors, *writes.deletes]
        assert len(touched) == len(set(touched)), "a document twice in a transaction"
        for part in writes.inserts.parts:
            document = bson.decode(part.raw)
            assert document["_id"] not in self.documents, "duplicate key"
            self.documents[document["_id"]] = document
        for part in writes.replaces.parts:
            document = bson.decode(part.raw)["u"]
            self.documents[document["_id"]] = document
        for key in writes.deletes:
            self.documents.pop(key, None)
        self.marks |= {key: int(mark) for key, mark in writes.marks.items()}


@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(NAMES), st.sampled_from(["counted", "counted", "closed", "spoilt"])),
            st.sampled_from(["prepare", "take", "take in parts"]),
        ),
        max_size=40,
    )
)
def test_what_is_taken_is_what_was_folded_however_often_it_was_prepared(steps: list[Any]) -> None:
    folder = OwnedFolder(None, Build(_projection()))  # type: ignore[arg-type] - nothing is read from it
    folder._young.update({name: _Entry(0, None, 0, stored=False) for name in NAMES})
    model, failed = _Model(), set[str]()
    expected: dict[str, int | None] = dict.fromkeys(NAMES)
    heads = dict.fromkeys(NAMES, 0)

    def take(*, whole: bool) -> None:
        changes, failures = folder.take()
        parts = [changes]
        while parts:
            part = parts.pop()
            assert isinstance(part, OwnedChanges)
            if whole or not part.divisible:
                model.apply(part)
            else:
                first, second = part.halves()
                assert first.aggregates | second.aggregates == part.aggregates
                assert not first.aggregates.keys() & second.aggregates.keys()
                assert first.events + second.events == part.events
                parts += [second, first]
        failed.update(_names(failures))

    spoilt: set[str] = set()
    for step in [*steps, "take"]:
        if step == "prepare":
            folder.prepare()
        elif isinstance(step, str):
            take(whole=step == "take")
        else:
            name, kind = step
            if name in spoilt:
                continue  # it is set aside when it is taken; the loop folds nothing more of it
            heads[name] += 1
            folder.fold([{"aggregateId": name, "sequenceNo": heads[name], "eventName": kind}], ())
            expected[name] = heads[name] if kind == "counted" else None
            if kind == "spoilt":
                spoilt.add(name)
    assert failed == spoilt
    for name in NAMES:
        if name not in spoilt:
            found = model.documents.get(name, {})
            assert found.get("last") == expected[name]
            assert max(found.get(MARK, 0), model.marks.get(name, 0)) == heads[name]


def _names(failures: list[Failure]) -> set[str]:
    return {failure.aggregate_id for failure in failures}
