"""Starting and ending background tasks."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

__all__ = ["end", "start", "together"]

AT_ONCE: Final = 20
"""Well below the connections of a client (100), which others need too."""


def start(coroutine: Coroutine[Any, Any, Any], name: str | None = None) -> asyncio.Task[Any]:
    """Starts a task that lives longer than what starts it, in a context of its own: a deadline set by `pymongo.timeout` around
    the caller's commands is not the task's.
    """
    return asyncio.get_running_loop().create_task(coroutine, name=name, context=contextvars.Context())


async def together(works: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Does a number of things, some at once; raises what the first one of them raised.

    While a loop is busy folding, each answer of MongoDB waits for its turn: what is asked one after the other adds that up.
    """
    waiting = iter(works)  # made only when their turn has come
    while some := list(itertools.islice(waiting, AT_ONCE)):
        for found in await asyncio.gather(*some, return_exceptions=True):
            if isinstance(found, BaseException):
                raise found


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
