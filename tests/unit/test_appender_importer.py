"""Reading files of events."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from appender.importer import BadFileError, Columns, count_rows, read_rows

if TYPE_CHECKING:
    from pathlib import Path

CSV = """when,who,what,colour
2024-01-02T00:00:00+01:00,b,painted,red
2024-01-01 12:00:00,a,made,
2024-01-01T13:00:00+01:00,a,painted,blue
"""
COLUMNS = Columns(aggregate_id="who", event_name="what", timestamp="when")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(CSV)
    return path


def test_the_columns_of_a_csv(table: Path) -> None:
    rows = list(read_rows(table, COLUMNS))
    assert [(row.line, row.aggregate_id, row.event["eventName"]) for row in rows] == [
        (2, "b", "painted"),
        (3, "a", "made"),
        (4, "a", "painted"),
    ]
    assert [row.event["payload"] for row in rows] == [{"colour": "red"}, {}, {"colour": "blue"}]
    assert rows[1].event["timestamp"] == "2024-01-01T12:00:00+00:00"
    assert count_rows(table) == 4


def test_sorting_by_timestamp_is_stable(table: Path) -> None:
    rows = read_rows(table, COLUMNS, "timestamp")
    assert [row.line for row in rows] == [3, 4, 2]  # 12:00 UTC twice


def test_event_ids_derive_from_the_row(table: Path, tmp_path: Path) -> None:
    first = [row.event["eventId"] for row in read_rows(table, COLUMNS)]
    again = [row.event["eventId"] for row in read_rows(table, COLUMNS, "timestamp")]
    assert len(set(first)) == 3
    assert set(again) == set(first)
    longer = tmp_path / "longer.csv"
    longer.write_text(CSV + "2024-01-03T00:00:00Z,c,made,green\n")
    assert [row.event["eventId"] for row in read_rows(longer, COLUMNS)][:3] == first
    other = tmp_path / "other.csv"
    other.write_text(CSV.replace("red", "pink"))
    assert [row.event["eventId"] for row in read_rows(other, COLUMNS)][1:] == first[1:]
    assert next(iter(read_rows(other, COLUMNS))).event["eventId"] != first[0]


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("case:concept:name,concept:name,time:timestamp,org:resource\nc1,start,2024-01-01T00:00:00Z,r\n")
    (row,) = read_rows(path)
    assert (row.aggregate_id, row.event["eventName"], row.event["payload"]) == ("c1", "start", {"org:resource": "r"})


def test_ndjson_keeps_its_fields(tmp_path: Path) -> None:
    path = tmp_path / "log.ndjson"
    path.write_text(
        '{"aggregateId":"a","eventId":"e1","eventName":"x","payload":{"n":1},"timestamp":"2024-01-01T00:00:00Z"}\n\n'
        '{"aggregateId":"b","eventName":"y","payload":{}}\n'
    )
    first, second = read_rows(path)
    assert first.event["eventId"] == "e1"
    assert first.event["payload"] == {"n": 1}
    assert second.line == 3
    assert second.event["eventId"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "x,y\n1,2\n", "line 1: name the column with --aggregate-id; the file has x, y"),
        ("a.csv", "", "the file has no columns"),
        ("a.csv", "aggregateId,eventName,a.b\n1,2,3\n", "'a.b' is no valid field name"),
        ("a.csv", "aggregateId,eventName\n1\n", "line 2: it has another number of cells"),
        ("a.csv", "aggregateId,eventName\n1,2,3\n", "line 2: it has another number of cells"),
        ("a.csv", "aggregateId,eventName,timestamp\n1,2,soon\n", "line 2: 'soon' is no ISO 8601 timestamp"),
        ("a.ndjson", '{"eventName":"x"}\n', "line 1: 'aggregateId'"),
        ("a.ndjson", '\n{"aggregateId":"a"\n', "line 2:"),
        ("a.ndjson", '{"aggregateId":"a","eventNme":"x"}\n', "line 1: unknown field eventNme"),
    ],
)
def test_a_file_that_is_no_log_is_refused_by_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(BadFileError) as caught:
        list(read_rows(path))
    assert says in str(caught.value)


def test_sorting_needs_timestamps(tmp_path: Path) -> None:
    path = tmp_path / "log.ndjson"
    path.write_text('{"aggregateId":"a","eventName":"x","payload":{}}\n')
    with pytest.raises(BadFileError, match="line 1"):
        read_rows(path, order="timestamp")
