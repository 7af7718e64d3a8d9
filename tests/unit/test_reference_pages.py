"""The generated pages are current and complete, and logs hold no credentials."""

from __future__ import annotations

import io
import json
import logging
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_plus

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from deploy.observability import log_events, pages
from eventstore import logs

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGES = pages.pages()


@pytest.mark.parametrize("name", PAGES)
def test_page_is_current(name: str) -> None:
    assert (pages.FOLDER / name).read_text() == PAGES[name], "make docs writes it anew"


def test_every_log_event_has_a_meaning_and_every_meaning_an_event() -> None:
    assert {event.name for event in log_events.found()} == log_events.MEANINGS.keys()


def test_every_setting_has_a_meaning() -> None:
    assert not re.search(r"\|\s+\|$", PAGES["settings.md"], re.MULTILINE)


@pytest.fixture
def log_lines() -> Iterator[io.StringIO]:
    """What is logged as a shipped process logs it."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    logs.configure("test", "debug")
    output = io.StringIO()
    handler = root.handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(output)
    try:
        yield output
    finally:
        root.handlers, root.level = handlers, level
        structlog.reset_defaults()


PASSWORDS = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=20).map(
    lambda text: f"pw§{text}"
)


@given(PASSWORDS, st.sampled_from(["mongodb", "mongodb+srv"]), st.booleans())
def test_a_password_in_a_connection_string_is_never_kept(password: str, scheme: str, quoted: bool) -> None:
    said = quote_plus(password) if quoted else password.replace("/", "")
    text = logs.redact(f"cannot reach {scheme}://user:{said}@db1.example,db2.example/?replicaSet=rs0 now")
    assert said not in text
    assert text == f"cannot reach {scheme}://***@db1.example,db2.example/?replicaSet=rs0 now"


URI = "mongodb://user:pw-4711@db.example/?replicaSet=rs0"


@pytest.mark.parametrize(
    "value",
    [URI, {"uri": URI}, [URI], {"deep": [{"er": (URI,)}]}, RuntimeError(URI)],
    ids=["text", "dict", "list", "nested", "exception"],
)
def test_no_field_shows_a_password(value: Any, log_lines: io.StringIO) -> None:
    structlog.get_logger("test").warning("something_failed", value=value)
    structlog.stdlib.get_logger("test").warning("something_failed", error=repr(value))
    line = log_lines.getvalue()
    assert "pw-4711" not in line
    assert "db.example" in line


def test_no_exception_and_no_line_of_a_library_shows_a_password(log_lines: io.StringIO) -> None:
    try:
        {}[URI]  # type: ignore[index]
    except KeyError:
        structlog.get_logger("test").exception("something_failed")
        logging.getLogger("library").exception("cannot reach %s", URI)
        logging.getLogger("library").warning("cannot reach", extra={"uri": URI})
    lines = [json.loads(line) for line in log_lines.getvalue().splitlines()]
    assert len(lines) == 3
    assert "pw-4711" not in log_lines.getvalue()
    assert all(line["component"] == "test" for line in lines)
