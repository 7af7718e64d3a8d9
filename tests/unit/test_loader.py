"""Projections from folders and modules: what is found, and what a mistake in a file is told as."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from projector.loader import load_file, load_folder, load_modules
from projector.projection import ProjectionError

if TYPE_CHECKING:
    from pathlib import Path

PERMITS = "name: permits\non:\n  Happened: {$inc: {steps: 1}}\n"
ORDERS = "name: orders\n'on':\n  Happened: {$inc: {steps: 1}}\n"


def test_a_folder_holds_several_files_with_several_documents(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(f"---\n{PERMITS}---\n")
    (tmp_path / "a.yml").write_text(f"{ORDERS}---\n{ORDERS.replace('orders', 'customers')}")
    (tmp_path / "README.md").write_text("no projection")
    assert [projection.name for projection in load_folder(tmp_path)] == ["orders", "customers", "permits"]


def test_yaml_means_what_json_means(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "name: permits\non:\n  Happened:\n    $set: "
        "{word: on, no: no, time: 1:30, day: 2020-01-01, octal: 010, yes: true, none: null, int: -1, float: 1e3, text: '1'}\n"
    )
    [projection] = load_file(file)
    assert projection.apply("k", None, {"eventName": "Happened"}) == {
        "_id": "k",
        "word": "on",
        "no": "no",
        "time": "1:30",
        "day": "2020-01-01",
        "octal": "010",
        "yes": True,
        "none": None,
        "int": -1,
        "float": 1000.0,
        "text": "1",
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            PERMITS.replace("{steps: 1}", "{steps: one}"),
            r"""a.yaml: permits: on\["Happened"\].\$inc.steps: 'one' must be""",
        ),
        (PERMITS + PERMITS, "(?s)a.yaml: the key 'name' stands twice.*line 4"),
        ("name: [", "(?s)a.yaml: .*line"),
        ("- permits", r"a.yaml: a projection must be a mapping, not \['permits'\]"),
        ("1: 2", "(?s)a.yaml: the key 1 must be a text"),
        ("", "there is no projection in it"),
        (f"{PERMITS}---\n{PERMITS}", "there are two projections 'permits'"),
        (
            f"{PERMITS}---\n{ORDERS}readModel: {{collection: permits}}",
            "'permits' and 'orders' share a read model, 'permits'",
        ),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_place(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ProjectionError, match=problem):
        load_folder(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ProjectionError, match=r"a\.yaml: "):
        load_folder(tmp_path)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ProjectionError, match="there is no such folder"):
        load_folder(tmp_path / "gone")


def module(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    return name


def test_modules_hold_projections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "from projector.projection import Projection\n{0} = Projection('{0}')\n{0}.on('*')(lambda state, event: None)\n"
    )
    first = module(tmp_path, "loaded_permits", text.format("permits"), monkeypatch)
    second = module(
        tmp_path, "loaded_orders", "from loaded_permits import permits\n" + text.format("orders"), monkeypatch
    )
    assert [projection.name for projection in load_modules([first, second])] == ["permits", "orders"]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("broken_import", "import nowhere_at_all", "module broken_import: ModuleNotFoundError: .*nowhere_at_all"),
        ("broken_syntax", "def", "module broken_syntax: SyntaxError"),
        ("broken_empty", "", "module broken_empty: there is no Projection in it"),
        (
            "broken_handlers",
            "from projector.projection import Projection\npermits = Projection('permits')",
            "module broken_handlers: permits: it has no handler",
        ),
        (
            "broken_name",
            "from projector.projection import Projection\npermits = Projection('No')",
            "module broken_name: ProjectionError: name: 'No' must be",
        ),
    ],
)
def test_a_module_without_projections_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, problem: str
) -> None:
    module(tmp_path, name, text, monkeypatch)
    with pytest.raises(ProjectionError, match=problem):
        load_modules([name])
