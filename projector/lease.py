"""Leases: which replica runs which partition.

A lease expires on the server's clock (`$$NOW`), so that no two machines' clocks are ever compared (Occurrent ADR 0114). It only
spares replicas from running into each other: what makes a stale owner harmless is the checkpoint's epoch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from eventstore.client import Database

__all__ = ["LEASES", "LEASE_SECONDS", "REPLICAS", "Leases"]

LEASES: Final = "projector.leases"
REPLICAS: Final = "projector.replicas"

LEASE_SECONDS: Final = 10.0
"""How long a partition stands still after its owner was killed. Shorter would let a stalled process (a long garbage
collection, a throttled pod) lose its partitions for nothing; they are released at once on SIGTERM."""


class Leases:
    """The leases that one replica (`owner`, a name no other process ever had) holds or wants."""

    def __init__(self, database: Database, owner: str, seconds: float = LEASE_SECONDS) -> None:
        self._leases = database[LEASES]
        self._replicas = database[REPLICAS]
        self.owner = owner
        self.seconds = seconds

    @property
    def _expiry(self) -> dict[str, Any]:
        return {"$dateAdd": {"startDate": "$$NOW", "unit": "millisecond", "amount": int(self.seconds * 1000)}}

    async def acquire(self, name: str) -> bool:
        """Takes a lease that is free or expired."""
        free = {
            "$or": [{"$lte": ["$expiresAt", "$$NOW"]}, {"$eq": ["$owner", self.owner]}]
        }  # missing is below any date
        mine = {"owner": self.owner, "expiresAt": self._expiry}
        taken = {key: {"$cond": [free, value, f"${key}"]} for key, value in mine.items()}
        try:
            found = await self._leases.find_one_and_update(
                {"_id": name}, [{"$set": taken}], upsert=True, return_document=ReturnDocument.AFTER
            )
        except DuplicateKeyError:  # two at once made it: the other one has it
            return False
        return found is not None and found["owner"] == self.owner

    async def renew(self, names: Iterable[str]) -> set[str]:
        """Renews leases; returns those that are still ours."""
        wanted = list(names)
        if not wanted:
            return set()
        await self._leases.update_many(
            {"_id": {"$in": wanted}, "owner": self.owner}, [{"$set": {"expiresAt": self._expiry}}]
        )
        held = self._leases.find({"_id": {"$in": wanted}, "owner": self.owner}, {"_id": 1})
        return {found["_id"] async for found in held}

    async def release(self, name: str) -> None:
        """Gives a lease back, so that another replica need not wait for its end."""
        await self._leases.delete_one({"_id": name, "owner": self.owner})

    async def holders(self, names: Iterable[str]) -> dict[str, str]:
        """Who holds each of these leases now; a free one is left out."""
        found = self._leases.find({"_id": {"$in": list(names)}, "$expr": {"$gt": ["$expiresAt", "$$NOW"]}})
        return {lease["_id"]: lease["owner"] async for lease in found}

    async def announce(self, builds: list[str]) -> dict[str, frozenset[str]]:
        """Says that this replica lives, for as long as a lease, and can run these builds; returns all that live."""
        live = {"builds": builds, "expiresAt": self._expiry}
        await self._replicas.update_one({"_id": self.owner}, [{"$set": live}], upsert=True)
        await self._replicas.delete_many({"$expr": {"$lte": ["$expiresAt", "$$NOW"]}})
        return {found["_id"]: frozenset(found["builds"]) async for found in self._replicas.find()}

    async def leave(self) -> None:
        """Takes this replica off the list, so that the others take its share."""
        await self._replicas.delete_one({"_id": self.owner})
