"""What a folder of shared documents hands to the writer: in parts it is the same, each event once and in its turn."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from projector.build import Build
from projector.projection import Projection
from projector.shared import SharedFolder, _SharedChanges

NAMES = ("a", "b", "c")


def _projection() -> Projection:
    projection = Projection("rooms", key="$payload.room")

    @projection.on("counted")
    def _(state: dict[str, Any], event: dict[str, Any]) -> None:
        """Not called: documents are folded within the transaction."""

    return projection


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(["counted", "noise", "skip", "take"])), max_size=40))
def test_parts_bring_each_mark_from_where_the_one_before_left_it(steps: list[tuple[str, str]]) -> None:
    folder = SharedFolder(None, Build(_projection()))  # type: ignore[arg-type] - nothing is read from it
    folder._marks.update(dict.fromkeys(NAMES, 0))
    folder._stored.update(dict.fromkeys(NAMES, 0))
    heads = dict.fromkeys(NAMES, 0)
    stored = dict.fromkeys(NAMES, 0)
    applied: list[tuple[str, int]] = []
    expected: list[tuple[str, int]] = []

    def take() -> None:
        parts = [folder.take()[0]]
        while parts:
            part = parts.pop()
            assert isinstance(part, _SharedChanges)
            if part.divisible:
                parts += reversed(part.halves())
                continue
            for name, (before, mark) in part._marks.items():
                assert before == stored[name] < mark
                stored[name] = mark
            applied.extend((item.event["aggregateId"], item.event["sequenceNo"]) for item in part._accepted)

    for name, kind in [*steps, ("a", "take")]:
        if kind == "take":
            take()
            continue
        heads[name] += 1
        if kind == "skip":
            folder.skip(name, heads[name])
            continue
        event = {"aggregateId": name, "sequenceNo": heads[name], "eventName": kind, "payload": {"room": "r"}}
        folder.fold([event], ())
        if kind == "counted":
            expected.append((name, heads[name]))
    assert applied == expected
    assert all(folder._stored[name] == stored[name] for name in NAMES)
