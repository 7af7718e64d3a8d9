"""Starting and ending background tasks."""

from __future__ import annotations

import asyncio
import contextvars
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

__all__ = ["end", "start"]


def start(coroutine: Coroutine[Any, Any, Any], name: str | None = None) -> asyncio.Task[Any]:
    """Starts a task that lives longer than what starts it, in a context of its own: a deadline set by `pymongo.timeout` around
    the caller's commands is not the task's.
    """
    return asyncio.get_running_loop().create_task(coroutine, name=name, context=contextvars.Context())


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
