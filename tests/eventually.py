"""Waiting for something to become true, with a deadline and never a fixed sleep."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["eventually", "eventually_equal"]

_T = TypeVar("_T")

_POLL_SECONDS: Final = 0.02


async def eventually(look: Callable[[], Awaitable[_T]], what: str = "", timeout: float = 30.0) -> _T:
    """Looks until the answer is true, and returns it. Fails after `timeout` seconds with the last answer."""
    deadline = time.monotonic() + timeout
    while True:
        found = await look()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {timeout} s: {what or 'it'} (the last answer was {found!r})"
        await asyncio.sleep(_POLL_SECONDS)


async def eventually_equal(look: Callable[[], Awaitable[_T]], expected: _T, timeout: float = 30.0) -> None:
    """Looks until the answer equals `expected`. Fails after `timeout` seconds with pytest's comparison of the two."""
    deadline = time.monotonic() + timeout
    found = await look()
    while found != expected and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_SECONDS)
        found = await look()
    assert found == expected
