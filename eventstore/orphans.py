"""Transactions that a killed process left open on the server, and their end.

MongoDB does not notice that their client is gone: it keeps them, with all that they wrote, until
`transactionLifetimeLimitSeconds` are over (60, looked at every 30). Until then whoever writes the same keys gets a
WriteConflict or waits. A process of ours that meets this ends them; every user may do so with the sessions of his own.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, TypeVar

import pymongo
from pymongo.errors import OperationFailure, PyMongoError

from eventstore.errors import Meaning, classify

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from eventstore.client import Client

__all__ = ["IDLE_SECONDS", "end_orphans", "past_orphans"]

_T = TypeVar("_T")

IDLE_SECONDS: Final = 2.0
"""A transaction that waits so long for its client's next word is taken for an orphan. Between two statements of ours lie
milliseconds; one that was only slow is told that it was aborted, and runs again, which costs less than a minute of conflicts."""

HELD_UP_SECONDS: Final = IDLE_SECONDS + 1
"""How long a write may be held up before that is taken for an orphan's doing: long enough for one to be known by its idleness."""


async def end_orphans(client: Client, component: str, idle_seconds: float = IDLE_SECONDS) -> int:
    """Ends the open transactions of this user and component (`connect`'s) that were idle for `idle_seconds`; how many.

    Raises what pymongo raises.
    """
    cursor = await client.admin.aggregate(
        [
            {"$currentOp": {"allUsers": False, "idleSessions": True}},
            {
                "$match": {
                    "active": False,
                    "appName": {"$regex": f"^eventprojector-{component}/"},
                    "transaction.timeInactiveMicros": {"$gt": int(idle_seconds * 1e6)},
                }
            },
            {"$project": {"lsid": "$lsid.id"}},
        ]
    )
    sessions = [{"id": found["lsid"]} async for found in cursor]
    if sessions:
        await client.admin.command("killSessions", sessions)
    return len(sessions)


async def past_orphans(client: Client, component: str, write: Callable[[], Awaitable[_T]]) -> _T:
    """Writes, and when that is held up once more, after the orphans of this component were ended. Raises what `write` raises."""
    try:
        with pymongo.timeout(HELD_UP_SECONDS):
            return await write()
    except PyMongoError as error:
        if not error.timeout and classify(error) is not Meaning.AGAIN:
            raise
    with contextlib.suppress(OperationFailure):  # a server that does not tell or end them: then this waits
        await end_orphans(client, component)
    return await write()
