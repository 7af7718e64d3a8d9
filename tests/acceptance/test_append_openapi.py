"""The API is what its OpenAPI document says: schemathesis makes requests from it, valid and not, and checks the answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from tests.appending import Api, Process

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.json"

schema = schemathesis.openapi.from_path(str(DOCUMENT))
schema.config.generation.update(max_examples=25)


@pytest.fixture(scope="module")
def url(mongodb_uri: str) -> Iterator[str]:
    import asyncio

    async def wait(process: Process) -> None:
        async with aiohttp.ClientSession() as session:
            await Api(process.url, session).ready()

    with Process.several(1, mongodb_uri, "test_openapi") as (process,):
        asyncio.run(wait(process))
        yield process.url


def _repeats(body: Any) -> bool:
    """Whether an eventId or an aggregateId stands twice in a request: refused, and no JSON Schema can say so."""
    if not isinstance(body, dict | list):
        return False
    entries = body if isinstance(body, list) else [body, *_items(body, "appends")]
    events = [event for entry in entries for event in (_items(entry, "events") or [entry]) if isinstance(event, dict)]
    for objects, names in ((events, ("eventId", "id")), (_items(body, "appends"), ("aggregateId",))):
        found = [str(each[name]) for each in objects if isinstance(each, dict) for name in names if each.get(name)]
        if len(set(found)) < len(found):
            return True
    return False


def _has_large_integer(value: Any) -> bool:
    """Whether an integer beyond 64 bits is written out: refused, while JSON Schema knows no difference from 1e300."""
    if isinstance(value, dict | list):
        return any(_has_large_integer(each) for each in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(2**63) <= value < 2**63


@schemathesis.serializer("application/x-ndjson")
def _lines(_context: Any, value: Any) -> bytes:
    return str(value).encode(errors="replace")


def _items(value: Any, name: str) -> list[Any]:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, list) else []


@schema.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_api_is_as_documented(case: schemathesis.Case, url: str) -> None:
    if case.media_type == "application/x-ndjson":
        hypothesis.assume(isinstance(case.body, str))  # any text is a stream of lines, each with its answer
    hypothesis.assume(not _repeats(case.body) and not _has_large_integer(case.body))
    case.call_and_validate(base_url=url)
