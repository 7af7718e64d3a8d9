"""Who owns an index: a record in MongoDB, so that two resources never fight over one index.

Collection `operator.indexes`, one document per index, `_id` `<collection>/<index>`. The unique `_id` decides a race; the
first claim wins until its resource is deleted. A resource that was made again under its name (also in a new cluster, after
the old one was lost) gets its claims back; hence two clusters that live must not use one name for one database. An index
without a claim is foreign: it is reported and never touched.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pymongo.errors import DuplicateKeyError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from eventstore.client import Database

__all__ = ["CLAIMS", "Claim", "Owner", "claim", "claims_on", "release", "release_all"]

CLAIMS: Final = "operator.indexes"


class Owner(NamedTuple):
    """The resource that owns something; `uid` tells it from an earlier one of the same name."""

    kind: str
    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"

    def succeeds(self, other: Owner) -> bool:
        """Whether it is the same resource, or the one that was made again under its name."""
        return self[:3] == other[:3]


class Claim(NamedTuple):
    """One index's owner, and whether the operator made the index (else it stood there, and is never dropped)."""

    owner: Owner
    made: bool


async def claims_on(database: Database, collection: str) -> dict[str, Claim]:
    """All claims on a collection's indexes, by the name of the index; one read over the `_id` index."""
    prefix = f"{collection}/"
    cursor = database[CLAIMS].find({"_id": {"$gte": prefix, "$lt": f"{collection}0"}})  # "0" is the sign after "/"
    return {row["index"]: _claim(row) async for row in cursor}


async def claim(database: Database, collection: str, index: str, owner: Owner, *, made: bool) -> Claim:
    """Claims an index for `owner`; the answer is the claim that holds, which may be another one's."""
    identity = f"{collection}/{index}"
    row: dict[str, Any] = {
        "_id": identity,
        "collection": collection,
        "index": index,
        "owner": owner._asdict(),
        "made": made,
        "at": datetime.datetime.now(datetime.UTC),
    }
    try:
        await database[CLAIMS].insert_one(row)
    except DuplicateKeyError:
        found = await database[CLAIMS].find_one({"_id": identity})
        if found is None:  # released in this very moment
            return await claim(database, collection, index, owner, made=made)
        return _claim(found)
    return Claim(owner, made)


async def take_over(database: Database, collection: str, index: str, owner: Owner, before: Claim) -> Claim:
    """Gives a claim to the resource that was made again under the name of its owner."""
    await database[CLAIMS].update_one(
        {"_id": f"{collection}/{index}", "owner.uid": before.owner.uid}, {"$set": {"owner": owner._asdict()}}
    )
    return before._replace(owner=owner)


async def release(database: Database, collection: str, indexes: Iterable[str], owner: Owner) -> None:
    """Gives up the claims on some indexes; what another resource owns is left alone."""
    identities = [f"{collection}/{index}" for index in indexes]
    await database[CLAIMS].delete_many({"_id": {"$in": identities}, "owner.uid": owner.uid})


async def release_all(database: Database, owner: Owner) -> None:
    """Gives up every claim of a resource."""
    await database[CLAIMS].delete_many({"owner.uid": owner.uid})


def _claim(row: dict[str, Any]) -> Claim:
    return Claim(Owner(**row["owner"]), bool(row["made"]))
