"""Ending background tasks."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["end"]


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels tasks and waits until they have ended; what they raise is of no interest any more.

    Cancelled again every second, since a cancellation can get lost in a library that is just handling something else (seen with
    pymongo when an answer arrives at the same moment).
    """
    ending = list(tasks)
    pending = {task for task in ending if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=1.0)
    await asyncio.gather(*ending, return_exceptions=True)  # or asyncio complains of what nobody has looked at
