"""Makes the embedded mongod a replica set of one, and shows whether it is primary. Runs beside it, in its pod.

Called as `initiate.py HOST:PORT FILE`: the name under which clients reach this mongod, and the file that exists while it
is primary (the readiness probe looks for it). It goes on asking, so that a mongod that lost its volume is initiated anew.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

NOT_YET_INITIALIZED = 94


def is_primary(client: MongoClient[dict[str, Any]], host: str) -> bool:
    """Whether this mongod is primary of the set; initiates the set where there is none."""
    try:
        client.admin.command("replSetGetStatus")
    except OperationFailure as error:
        if error.code != NOT_YET_INITIALIZED:
            raise
        client.admin.command("replSetInitiate", {"_id": "rs0", "members": [{"_id": 0, "host": host}]})
        print(f"initiated the replica set rs0 with {host}", flush=True)
    return bool(client.admin.command("hello").get("isWritablePrimary"))


def main(host: str, primary: Path) -> None:
    """Asks every two seconds, for ever."""
    said = ""
    with MongoClient[dict[str, Any]](
        "127.0.0.1",
        int(host.rpartition(":")[2]),
        directConnection=True,
        serverSelectionTimeoutMS=1_000,
        socketTimeoutMS=10_000,
    ) as client:
        while True:
            found = False
            try:
                found = is_primary(client, host)
                state = "primary" if found else "not yet primary"
            except PyMongoError as error:
                state = f"waiting: {error.__class__.__name__} {getattr(error, 'code', None) or ''}".rstrip()
            if state != said:
                print(said := state, flush=True)
            if found:
                primary.touch()
            else:
                primary.unlink(missing_ok=True)
            time.sleep(2)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
