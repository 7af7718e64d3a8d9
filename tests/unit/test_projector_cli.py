"""The command line of `projector`: what it refuses, and how answers look. No MongoDB."""

from __future__ import annotations

import datetime
import json
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from projector import render
from projector.cli import main
from projector.overview import ParkedInfo, ParkedPage, Summary
from projector.verify import Finding, Verification
from projector.waiting import Waited

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

AWAY = {"MONGODB_URI": "mongodb://someone:secret-word@127.0.0.1:1/?directConnection=true"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",),
        ("run", "--from-database", "--module", "x"),
        ("run", "--projections", __file__),
        ("partitions", "orders", "0"),
        ("partitions", "orders", "65"),
        ("wait", "orders", "o-1"),
        ("wait", "orders", "o-1", "0"),
        ("wait", "orders", "o-1", "1", "--timeout", "301"),
        ("verify", "orders", "--sample", "0"),
        ("list", "--output", "yaml"),
        ("parked", "list", "orders", "--limit", "1001"),
        ("rebuild",),
        ("sing",),
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(main, arguments, env=AWAY)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


def test_wrong_settings_are_named_without_their_values() -> None:
    env = {"PROJECTOR_HTTP_PORT": "eighty", "PROJECTOR_LEASE_SECONDS": "0"}
    result = CliRunner().invoke(main, ["list"], env=env)
    assert result.exit_code == 1
    assert "PROJECTOR_HTTP_PORT" in result.stderr
    assert "PROJECTOR_LEASE_SECONDS" in result.stderr
    assert "eighty" not in result.stderr
    result = CliRunner().invoke(main, ["list"], env={"LOG_LEVEL": "loud"})
    assert result.exit_code == 1
    assert "LOG_LEVEL" in result.stderr
    result = CliRunner().invoke(main, ["list"], env={"MONGODB_URI_FILE": "/nowhere/at/all"})
    assert result.exit_code == 1
    assert "/nowhere/at/all" in result.stderr


def test_projections_that_are_wrong_are_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "orders.yaml").write_text('name: orders\n"on": {a: {$inc: {n: one}}}\n')
    result = CliRunner().invoke(main, ["run", "--projections", str(tmp_path)])
    assert result.exit_code == 1
    assert "orders.yaml" in result.stderr
    assert "'one' must be a number" in result.stderr
    for module in ("no.such.module", "json"):
        result = CliRunner().invoke(main, ["run", "--module", module])
        assert result.exit_code == 1
        assert f"module {module}" in result.stderr
    result = CliRunner().invoke(main, ["run"], env={"PROJECTOR_PROJECTIONS": str(tmp_path / "none")})
    assert result.exit_code == 1
    assert "no such folder" in result.stderr


def test_a_module_of_the_present_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_alone.py").write_text("raise RuntimeError('found, and read')\n")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["run", "--module", "mine_alone"])
    assert "found, and read" in result.stderr


def _summary(**fields: object) -> Summary:
    known: dict[str, object] = dict.fromkeys(Summary.__struct_fields__) | {
        "name": "orders", "state": "live", "partitions": 1,
    }  # fmt: skip
    return Summary(**(known | fields))  # type: ignore[arg-type]  # by name, from a table


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    def _text(renderable: RenderableType) -> str:
        render.show(renderable)
        return capsys.readouterr().out

    now = datetime.datetime.now(datetime.UTC)
    row = _summary(
        version=2, lag_seconds=1.25, parked=3, candidate="orders.v3", rebuild={"percent": 41.5}, error="it is [red]wrong",
        updated_at=now - datetime.timedelta(seconds=61),
    )  # fmt: skip
    text = _text(render.summaries([row]))
    for part in ("orders", "1.2 s", "orders.v3 42 %", "0:01:01 ago", "it is [red]wrong"):
        assert part in text
    assert "No projections" in _text(render.summaries([]))
    record = ParkedInfo(
        build="orders.v2", aggregate_id="[bold]o-1", sequence_no=7, event_id=None, event_name="Paid", category="fold",
        reason="KeyError: [x]", attempts=9, state="parked", since=now, due=now,
    )  # fmt: skip
    text = _text(render.parked(ParkedPage(parked=[record], next="orders.v2/o-1")))
    for part in ("[bold]o-1", "Paid", "KeyError: [x]", "--after orders.v2/o-1"):
        assert part in text
    finding = Finding(kind="document", key="[o]", detail="total: it is [1], and should be [2]")
    text = _text(
        render.verification(
            Verification(
                name="orders", build="orders.v2", documents=5, seconds=0.1, findings=[finding], truncated=True,
                incomplete="it took too long",
            )
        )
    )  # fmt: skip
    for part in ("[o]", "should be [2]", "There is more", "it took too long"):
        assert part in text
    late = Waited(name="orders", aggregate_id="[a]", sequence_no=2, reached=False, mark=1, reason="no [b]")
    assert "event 2 of [a]: it is at 1 (no [b])" in _text(render.waited(late))


def test_json_is_that_of_the_http_api() -> None:
    parsed = json.loads(render.json_text({"projections": [_summary(lag_seconds=0.0)]}))
    assert parsed["projections"][0]["lagSeconds"] == 0.0
    assert parsed["projections"][0]["updatedAt"] is None
