"""Transactions that a killed process left open on the server, and their end.

MongoDB does not notice that their client is gone: it keeps them, with all that they wrote, until
`transactionLifetimeLimitSeconds` are over (60, looked at every 30). Until then whoever writes the same keys gets a
WriteConflict or waits. A process of ours that meets this ends them; every user may do so with the sessions of his own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from eventstore.client import Client

__all__ = ["IDLE_SECONDS", "end_orphans"]

IDLE_SECONDS: Final = 2.0
"""A transaction that waits so long for its client's next word is taken for an orphan. Between two statements of ours lie
milliseconds; one that was only slow is told that it was aborted, and runs again, which costs less than a minute of conflicts."""


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
